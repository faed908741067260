"""Tokenizers of several kinds, built in memory, and files to read: for the test_data_* modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from rlhf.config.schema import DataConfig
from rlhf.data.prepare import StageData, prepare

SHARED = Path(__file__).parents[3] / "shared" / "data"
CASES = SHARED.parent / "cases" / "data"
TEXTS = [
    "\n\nHuman: What is the capital of France?\n\nAssistant: It is Paris, of course.",
    "\n\nHuman: Which colour is the sky?\n\nAssistant: Blue. I am glad that you ask!",
    "user system assistant",
]


def needs_shared(name: str) -> Any:
    """Skip where the shared data is absent."""
    return pytest.mark.skipif(
        not (SHARED / name).exists(), reason=f"../shared/data/{name} is not here"
    )


def _wrap(core: Tokenizer, special: dict[str, str]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def _byte_bpe(tokens: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    return core


def gpt2_like() -> Any:
    """GPT-2: one special token for everything, nothing prepended, no pad."""
    end = "<|endoftext|>"
    return _wrap(_byte_bpe([end]), {"bos_token": end, "eos_token": end, "unk_token": end})


def smollm_like() -> Any:
    """SmolLM2: ChatML tokens, pad == eos == <|im_end|>, <|endoftext|> unused."""
    core = _byte_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return _wrap(core, {**names, "unk_token": "<|endoftext|>"})


def opt_like() -> Any:
    """OPT: bos == eos == </s>, prepended by the tokenizer; a pad of its own."""
    core = _byte_bpe(["<pad>", "</s>"])
    core.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )
    return _wrap(core, {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"})


def llama_like(scheme: str = "first") -> Any:
    """Llama: SentencePiece-like with a dummy space, <s> prepended.

    `scheme`: Metaspace's `first` or `always`, which spare a text that begins with a space, or
    `legacy`, Llama 2's normaliser, which does not.
    """
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if scheme == "legacy":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        core.normalizer = normalizers.Sequence(steps)
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ")]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return _wrap(core, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def eos_appending() -> Any:
    """T5- or Gemma-like: puts eos after every text by itself."""
    core = _byte_bpe(["<pad>", "</s>"])
    core.add_special_tokens([AddedToken("</s>", special=True)])
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return _wrap(core, {"eos_token": "</s>", "pad_token": "<pad>"})


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2_like,
    "smollm": smollm_like,
    "opt": opt_like,
    "llama": llama_like,
    "llama_legacy": lambda: llama_like("legacy"),
    "eos_appending": eos_appending,
}


def pair(number: int, **changes: Any) -> dict[str, Any]:
    """A row of rm-static's schema."""
    row = {
        "prompt": f"\n\nHuman: question {number}?\n\nAssistant:",
        "response": f" yes {number}.",
        "chosen": f" yes {number}.",
        "rejected": f" no {number}.",
    }
    return {**row, **changes}


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write rows; text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def run(path: Any, tokenizer: Any, cache: Path, step: int = 2, **settings: Any) -> StageData:
    """`prepare` with small defaults; names of DataConfig's fields go there."""
    given = {
        name: settings.pop(name, default)
        for name, default in {
            "seed": 1,
            "max_prompt_length": 200,
            "max_length": 300,
            "response_column": "auto",
            "margins": False,
            "part": "train",
        }.items()
    }
    paths = [str(one) for one in path] if isinstance(path, list) else [str(path)]
    data = DataConfig(path=paths, cache_dir=str(cache), **settings)
    return prepare(data, step, tokenizer, split=given.pop("part"), **given)  # type: ignore[arg-type]
