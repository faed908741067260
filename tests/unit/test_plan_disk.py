"""Bytes on disk: by hand, and against what DeepSpeed and transformers really write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf import models
from rlhf.config.load import load_config
from rlhf.config.schema import EngineConfig, ModelConfig
from rlhf.config.training import LoraConfig
from rlhf.engine.checkpoint import save_engine
from rlhf.plan.disk import StepDisk, needed, published, saved, step_disk
from rlhf.plan.known import known_config
from rlhf.plan.read import read_shape
from rlhf.plan.roles import Ranks, Shapes, make_role
from rlhf.plan.shapes import shape_of
from rlhf.stages import get
from step1_sft.main import sft_step
from tests.unit import model_help as help_

OPT = shape_of(known_config("facebook/opt-125m") or {})
SHAPES = Shapes(OPT, OPT)


def on_disk(directory: Path, *suffixes: str) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.suffix in suffixes)


def disk_of(step: int, world: int = 1, **settings: Any) -> StepDisk:
    config = load_config(None, {key.replace("__", "."): v for key, v in settings.items()})
    return step_disk(config, get(step), SHAPES, Ranks(world, True))


def test_steps_by_hand() -> None:
    """fp32, stage 0: an artifact of 4 bytes a parameter; a checkpoint has two moments more. Three
    are there at once where two are kept. Step 3 trains two models."""
    assert disk_of(1) == StepDisk(4.0 * OPT.causal, 12.0 * OPT.causal, 3)
    assert disk_of(2) == StepDisk(4.0 * OPT.scalar, 12.0 * OPT.scalar, 3)
    both = float(OPT.causal + OPT.scalar)
    one_kept = {"checkpoint__keep_last": 1}
    assert disk_of(3, **one_kept) == StepDisk(4 * both, 12 * both, 2)
    grpo = {"step3__algorithm": "grpo", "step3__rollout__samples_per_prompt": 2}
    assert disk_of(3, **grpo) == disk_of(1)


@pytest.mark.parametrize(("stage", "per_parameter"), [(0, 12), (1, 16), (2, 16), (3, 12)])
def test_stages_by_hand(stage: int, per_parameter: int) -> None:
    """The ranks' shards together are the whole, on any number of them."""
    for world in (1, 4):
        assert disk_of(1, world, step1__engine__zero_stage=stage).checkpoint == (
            per_parameter * OPT.causal
        )


def test_an_average_is_published_and_saved() -> None:
    plain, averaged = disk_of(3, 4), disk_of(3, 4, step3__ppo__ema_decay=0.9)
    assert averaged.artifact - plain.artifact == 4 * OPT.causal
    assert averaged.checkpoint - plain.checkpoint == 4 * 4 * OPT.causal, "each rank its own"
    shard = {"step3__actor__engine__zero_stage": 3}
    more = disk_of(3, 4, step3__ppo__ema_decay=0.9, **shard).checkpoint
    assert more - disk_of(3, 4, **shard).checkpoint == 4 * OPT.causal


def test_the_fullest_moment_by_hand() -> None:
    """A step's checkpoints go when its artifact is there: 1 + 3 x 10, or 1 + 2 + 3 x 5."""
    assert needed([StepDisk(1, 10, 3), StepDisk(2, 5, 3)]) == 31
    assert needed([StepDisk(1, 10, 3), StepDisk(2, 50, 3)]) == 153
    assert needed([]) == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_is_planned(
    stage: int, rank: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 10%: small files have names and shapes too, most of them for adapters."""
    help_.world_of_one(monkeypatch)
    settings = EngineConfig(zero_stage=stage)  # type: ignore[arg-type]
    lora = {"rank": rank}
    policy = help_.load_policy("llama", lora=lora, dtype=dtype, engine=settings)
    engine = help_.train_engine(policy, engine=settings, dtype=dtype)
    sft_step(engine, help_.sft_batches(help_.sft_rows(2), 2))
    save_engine(engine, tmp_path / "engine")
    models.Snapshot(engine.module).write(tmp_path / "model", help_.tokenizer(), card="")
    role = make_role(
        read_shape(help_.tiny()),
        ModelConfig(dtype=dtype, lora=LoraConfig(rank=rank)),  # type: ignore[arg-type]
        settings, Ranks(1, True), scalar=False, trains=True,
    )  # fmt: skip
    assert saved(role) == pytest.approx(
        on_disk(tmp_path / "engine", ".pt"), rel=0.1, abs=1e5 if rank else 0
    )
    assert published(role) == pytest.approx(
        on_disk(tmp_path / "model", ".safetensors"), rel=0.1, abs=2e4
    )
