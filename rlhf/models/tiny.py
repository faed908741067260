"""Tiny decoders made on the spot: half a million random weights and a BPE tokenizer.

What `tiny:FAMILY` names. The directory that `build_tiny` writes is a plain Hugging Face one: Auto
classes load it with no code of ours. All sizes can be overridden, so tests can go smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from rlhf.errors import ConfigError

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCAB_SIZE = 1024
SIZE = {"hidden": 128, "layers": 2, "heads": 4, "mlp": 352, "positions": 512}


def _llama(size: Mapping[str, int], common: dict[str, Any]) -> PretrainedConfig:
    return LlamaConfig(
        **_rotary(size), num_key_value_heads=size["heads"], attention_dropout=0.0, **common
    )


def _qwen3(size: Mapping[str, int], common: dict[str, Any]) -> PretrainedConfig:
    # Not qwen2: for that model type AutoTokenizer ignores the tokenizer that is saved with it.
    return Qwen3Config(
        **_rotary(size),
        num_key_value_heads=size["heads"],
        head_dim=size["hidden"] // size["heads"],
        attention_dropout=0.0,
        **common,
    )


def _gemma2(size: Mapping[str, int], common: dict[str, Any]) -> PretrainedConfig:
    head = size["hidden"] // size["heads"]
    return Gemma2Config(
        **_rotary(size),
        num_key_value_heads=size["heads"],
        head_dim=head,
        query_pre_attn_scalar=head,
        sliding_window=size["positions"],
        attention_dropout=0.0,
        **common,
    )


def _gpt_neox(size: Mapping[str, int], common: dict[str, Any]) -> PretrainedConfig:
    return GPTNeoXConfig(
        **_rotary(size), attention_dropout=0.0, hidden_dropout=0.0, classifier_dropout=0.0, **common
    )


def _opt(size: Mapping[str, int], common: dict[str, Any]) -> PretrainedConfig:
    return OPTConfig(
        hidden_size=size["hidden"],
        word_embed_proj_dim=size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        ffn_dim=_two_matrix_mlp(size),
        max_position_embeddings=size["positions"],
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        **common,
    )


def _gpt2(size: Mapping[str, int], common: dict[str, Any]) -> PretrainedConfig:
    return GPT2Config(
        n_embd=size["hidden"],
        n_layer=size["layers"],
        n_head=size["heads"],
        n_inner=_two_matrix_mlp(size),
        n_positions=size["positions"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        **common,
    )


def _bloom(size: Mapping[str, int], common: dict[str, Any]) -> PretrainedConfig:
    # BLOOM's feed-forward is always 4 x hidden, and its positions (ALiBi) have no table.
    return BloomConfig(
        hidden_size=size["hidden"],
        n_layer=size["layers"],
        n_head=size["heads"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **common,
    )


TINY: dict[str, Callable[[Mapping[str, int], dict[str, Any]], PretrainedConfig]] = {
    "llama": _llama,
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "bloom": _bloom,
}


def build_tiny(
    family: str,
    texts: Iterable[str],
    directory: Path,
    *,
    seed: int,
    vocab_size: int = VOCAB_SIZE,
    size: Mapping[str, int] | None = None,
) -> None:
    """Writes a random model of a family in TINY, with a tokenizer trained on the texts.

    `size` overrides entries of SIZE. The vocabulary has at most `vocab_size` tokens, fewer where
    the texts do not yield as many merges; the embedding has exactly as many rows. The same
    arguments write the same bytes; the process's random state is left as it was. Raises
    ConfigError for an unknown family or size, or a vocabulary below 256 bytes + 3.
    """
    config_of = TINY.get(family)
    if config_of is None:
        raise ConfigError(
            f"tiny:{family}: no such family; choose one of {', '.join(TINY)}, "
            "e.g. step1.model.name=tiny:llama"
        )
    sizes = _sizes(size or {})
    tokenizer = train_tokenizer(texts, vocab_size, max_length=sizes["positions"])
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = config_of(
        sizes, {"vocab_size": len(tokenizer), "tie_word_embeddings": True, **special}
    )
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


def _rotary(size: Mapping[str, int]) -> dict[str, Any]:
    """Names shared by the configurations in Llama's style."""
    return {
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "intermediate_size": size["mlp"],
        "max_position_embeddings": size["positions"],
    }


def _two_matrix_mlp(size: Mapping[str, int]) -> int:
    """A width that gives two matrices as many weights as three of `mlp` (a gated one) have."""
    return size["mlp"] * 3 // 2


def _sizes(overrides: Mapping[str, int]) -> dict[str, int]:
    unknown = sorted(set(overrides) - set(SIZE))
    if unknown:
        raise ConfigError(f"tiny model: unknown size {unknown[0]!r}; choose from {', '.join(SIZE)}")
    return {**SIZE, **overrides}
