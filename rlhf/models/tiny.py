"""Tiny decoders made on the spot: half a million random weights and a BPE tokenizer.

What `tiny:FAMILY` names. The directory that `build_tiny` writes is a plain Hugging Face one: Auto
classes load it with no code of ours. All sizes can be overridden, so tests can go smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from rlhf.errors import ConfigError
from rlhf.families import TINY_SIZE, TINY_VOCAB, tiny_settings

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def build_tiny(
    family: str,
    texts: Iterable[str],
    directory: Path,
    *,
    seed: int,
    vocab_size: int = TINY_VOCAB,
    size: Mapping[str, int] | None = None,
) -> None:
    """Writes a random model of a family in TINY_FAMILIES, with a tokenizer trained on the texts.

    `size` overrides entries of TINY_SIZE. The vocabulary has at most `vocab_size` tokens, fewer
    where the texts do not yield as many merges; the embedding has exactly as many rows. The same
    arguments write the same bytes; the process's random state is left as it was. Raises
    ConfigError for an unknown family or size, or a vocabulary below 256 bytes + 3.
    """
    sizes = _sizes(size or {})
    settings = tiny_settings(family, sizes)
    tokenizer = train_tokenizer(texts, vocab_size, max_length=sizes["positions"])
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = AutoConfig.for_model(**settings, vocab_size=len(tokenizer), **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; ids 0, 1, 2 are pad, bos, eos.

    It adds no token by itself, pads on the left, and decodes every text back byte for byte.
    Raises ConfigError when `vocab_size` has no room for all bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + 3
    if vocab_size < least:
        raise ConfigError(f"vocab_size {vocab_size}: byte-level BPE needs {least} or more")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _sizes(overrides: Mapping[str, int]) -> dict[str, int]:
    unknown = sorted(set(overrides) - set(TINY_SIZE))
    if unknown:
        raise ConfigError(
            f"tiny model: unknown size {unknown[0]!r}; choose from {', '.join(TINY_SIZE)}"
        )
    return {**TINY_SIZE, **overrides}
