"""One of two gloo ranks: reads what one process saved, goes on, and saves for one process.

Engines first; then the steps that `jobs.json` names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.schema import EngineConfig
from rlhf.engine import comm
from rlhf.engine.checkpoint import load_engine, save_engine
from rlhf.engine.ema import WeightEMA
from rlhf.engine.train import TrainEngine
from step1_sft.main import sft_step
from tests.faults.test_resume import cut_off
from tests.unit import model_help as help_
from tests.unit.ranks_help import finish
from tests.unit.test_steps_main import config, step

STAGES = (0, 1, 2, 3)
# Who saved (one process), who reads (two ranks).
PAIRS = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (2, 0), (2, 2), (2, 3), (3, 0), (3, 1), (3, 3)]


def engine(
    stage: int, dtype: str = "float32", lora: dict[str, Any] | None = None, **optim: Any
) -> TrainEngine:
    """Two parameter groups: biases and norms are without weight decay."""
    settings = EngineConfig(zero_stage=stage)
    policy = help_.load_policy(engine=settings, dtype=dtype, lora=lora)
    return help_.train_engine(policy, engine=settings, dtype=dtype, **{"weight_decay": 0.1} | optim)


def train(engine: TrainEngine, steps: int) -> list[dict[str, float]]:
    """Optimiser steps on this rank's part of the same rows."""
    mine = help_.sft_rows()[comm.rank() :: comm.world_size()]
    return [sft_step(engine, help_.sft_batches(mine, 4)) for _ in range(steps)]


def average(engine: TrainEngine, place: Path) -> None:
    """Saves an EMA that differs from the weights, each rank its state; and what it publishes."""
    ema = WeightEMA(engine.module, 0.5)
    for average in ema.averages:
        average.mul_(2.0)
    torch.save(ema.state_dict(), f"{place}.{comm.rank()}")
    publish(ema, engine, place)


def publish(ema: WeightEMA, engine: TrainEngine, place: Path) -> None:
    with ema.swapped_in():
        whole = help_.weights(engine.module)
    if comm.rank() == 0:
        torch.save(whole, f"{place}.whole")


def main(out: Path) -> None:
    for stage, other in PAIRS:
        name = f"one{stage}-two{other}"
        two = engine(other)
        load_engine(two, out / f"one{stage}", stage=stage, world=1)
        save_engine(two, out / name)
        ema = WeightEMA(two.module, 0.5)
        ema.load_shards([torch.load(f"{out / f'one{stage}'}.ema.0")])
        publish(ema, two, out / f"{name}.ema")
        found = train(two, 2)
        if comm.rank() == 0:
            (out / f"{name}.json").write_text(json.dumps(found))
        if stage == 0:
            save_engine(two, out / f"two{other}")
            torch.save(ema.state_dict(), f"{out / f'two{other}'}.ema.{comm.rank()}")
    for job in json.loads((out / "jobs.json").read_text()):
        work(**job)


def work(
    number: int, changes: dict[str, Any], root: str, run: str, stop_at: int | None = None
) -> None:
    """A step, in as many processes as there are; ended right after position `stop_at` was saved."""
    settings = config(Path(root), **{"checkpoint": {"save_every": 1}} | changes)
    if stop_at is None:
        step(number, settings, Path(root) / "run", Path(run))
    else:
        with pytest.MonkeyPatch.context() as patch:
            cut_off(patch, stop_at, number, settings, Path(run), Path(root))


if __name__ == "__main__":
    finish(main)
