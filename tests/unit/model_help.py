"""Tiny models and batches shared by the engine, model and step tests. All are made once."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import data, models
from rlhf.config.schema import EngineConfig, ModelConfig, OptimConfig
from rlhf.config.training import LoraConfig
from rlhf.engine import comm
from rlhf.engine.train import TrainEngine
from rlhf.models.tiny import build_tiny

ROOT = Path(__file__).parents[2]
SIZE = {"hidden": 32, "layers": 2, "heads": 4, "mlp": 48, "positions": 96}
TEXTS = [
    "\n\nHuman: What is the capital of France?\n\nAssistant: It is Paris, of course.",
    "\n\nHuman: Which colour is the sky?\n\nAssistant: Blue. I am glad that you ask!",
] * 2
PAD = 0


@functools.cache
def scratch() -> Path:
    """A directory for this process, removed at its end; or that of the process that started it."""
    if given := os.environ.get("RLHF_TEST_SCRATCH"):
        return Path(given)
    path = Path(tempfile.mkdtemp(prefix="rlhf-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def tiny(family: str = "llama") -> str:
    """A random model of the family as a Hugging Face directory."""
    path = scratch() / f"tiny-{family}"
    if not path.exists():
        build_tiny(family, TEXTS, path, seed=3, vocab_size=300, size=SIZE)
    return str(path)


def world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """For fixtures: this process is in a process group of size 1, made once.

    The environment is as before after the test: other tests start processes of their own.
    """
    with pytest.MonkeyPatch.context() as kept:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            kept.delenv(name, raising=False)  # undone at the end, set below or not
        comm.init_distributed()
    monkeypatch.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it


@functools.cache
def tokenizer(family: str = "llama") -> Any:
    return models.load_tokenizer(tiny(family), template="human_assistant")


def load_policy(
    family: str = "llama",
    *,
    name: str | None = None,
    lora: dict[str, Any] | None = None,
    dtype: str = "float32",
    engine: EngineConfig | None = None,
    dropout: bool = False,
    vocab_size: int | None = None,
    **settings: Any,
) -> Any:
    return models.load_causal(
        name or tiny(family),
        ModelConfig(lora=LoraConfig(**(lora or {})), **settings),
        engine=engine or EngineConfig(),
        dtype=dtype,
        pad_token_id=PAD,
        vocab_size=vocab_size or len(tokenizer(family)),
        dropout=dropout,
    )


def load_value(
    family: str = "llama",
    *,
    name: str | None = None,
    lora: dict[str, Any] | None = None,
    dtype: str = "float32",
    engine: EngineConfig | None = None,
    new_head: bool = True,
    seed: int = 0,
) -> Any:
    return models.load_scalar(
        name or tiny(family),
        ModelConfig(lora=LoraConfig(**(lora or {}))),
        engine=engine or EngineConfig(),
        dtype=dtype,
        pad_token_id=PAD,
        vocab_size=len(tokenizer(family)),
        new_head=new_head,
        seed=seed,
    )


def train_engine(
    model: Any, *, engine: EngineConfig | None = None, dtype: str = "float32", steps: int = 10,
    **optim: Any,
) -> TrainEngine:  # fmt: skip
    settings = {"learning_rate": 1e-2, "scheduler": "linear", "max_grad_norm": 1.0} | optim
    return TrainEngine(
        model, engine or EngineConfig(), OptimConfig(**settings), dtype=dtype, total_steps=steps
    )


def sft_rows(count: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of very different lengths, so that the numbers of counted tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, 200, (4 + 2 * i,), generator=generator).tolist()
        rows.append({"prompt_ids": ids[: 2 + i % 3], "answer_ids": [*ids[2 + i % 3 :], 2]})
    return rows


def sft_batches(rows: list[dict[str, Any]], size: int) -> list[Any]:
    return [data.collate_sft(rows[i : i + size], PAD) for i in range(0, len(rows), size)]


def weights(module: Any) -> dict[str, torch.Tensor]:
    """Whole weights as they would be published (collective)."""
    return models.Snapshot(module).state


def spread(module: Any, seed: int = 0, scale: float = 0.3) -> None:
    """Larger random weights: tiny initial ones give almost equal log-probs everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(noise.to(parameter.dtype))


@functools.cache
def lively(family: str = "llama") -> str:
    """As `tiny`, with larger weights."""
    path = scratch() / f"lively-{family}"
    if path.exists():
        return str(path)
    module = load_policy(family)
    spread(module)
    models.Snapshot(module).write(path, tokenizer(family), card="")
    return str(path)


@functools.cache
def reward_dir(family: str = "llama") -> str:
    """A saved reward model with known score statistics."""
    path = scratch() / f"reward-{family}"
    if path.exists():
        return str(path)
    module = load_value(family, name=lively(family), seed=5)
    module.set_statistics(0.25, 2.0)
    models.Snapshot(module).write(path, tokenizer(family), card="")
    return str(path)
