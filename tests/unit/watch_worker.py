"""One of two gloo ranks whose weights, results or pace are spoiled: test_watch.py tells the rest.

`python -m tests.unit.watch_worker DIR CASE...`: DIR/CASE.json is written by rank 0.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rlhf.config.load import load_config
from rlhf.config.resolve import resolve_step
from rlhf.config.schema import TrainConfig
from rlhf.engine import comm
from rlhf.errors import Corrupted
from rlhf.harness import StepRun
from rlhf.resume import Keeper
from rlhf.stragglers import Stragglers
from rlhf.supervised import Supervised
from step1_sft.main import main as step1_main
from step3_ppo.main import main as step3_main
from tests.unit import model_help as help_

SIZES: dict[str, Any] = {
    "step1.train.batch_size": 8, "step1.train.micro_batch_size": 4, "step1.train.max_steps": 4,
    "step1.train.log_every": 1, "step1.max_prompt_length": 40, "step1.max_length": 64,
    "step3.rollout": {"prompts": 8, "batch_size": 8, "max_new_tokens": 6, "max_prompt_length": 40},
    "step3.iterations": 3, "step3.micro_batch_size": 4, "step3.eval.prompts": 4,
    "step3.log_every": 1, "step1.model.name": help_.lively(),
    "track.trackers": [], "data.max_train_rows": 60, "data.max_eval_rows": 8,
    "checkpoint.save_every": 1, "checkpoint.keep_last": 9, "step1.optim.learning_rate": 1e-3,
}  # fmt: skip
Spoil = Callable[[Keeper], None]


def flip(module: Any, name: str, bit: int = 20) -> None:
    """One bit of the first number of a weight."""
    (tensor,) = [p for n, p in module.named_parameters() if n.endswith(name)]
    with torch.no_grad():
        tensor.data.view(-1).view(torch.int32)[:1] ^= 1 << bit


def run_step(
    out: Path, case: str, step: int, spoil: Spoil | None, changes: dict[str, Any]
) -> dict[str, Any]:
    """A whole step with a checkpoint after each of its steps; `spoil` after the second, on rank 1.

    What is told of it: the error, and the checkpoints that there are.
    """
    resolved = resolve_step(
        load_config(None, {**SIZES, "data.cache_dir": str(out / "cache"), **changes}), step,
        run_dir=out / case, world_size=2,
        parents={"sft": help_.lively(), "reward": help_.reward_dir()} if step == 3 else {},
    )  # fmt: skip
    run = StepRun(resolved, comm.rank())
    run.step_dir.mkdir(parents=True, exist_ok=True)
    after = Keeper.after

    def then_spoil(keeper: Keeper, position: int, *args: Any, **named: Any) -> None:
        if position == 2 and spoil is not None and comm.rank() == 1:
            spoil(keeper)
        after(keeper, position, *args, **named)

    Keeper.after = then_spoil  # type: ignore[method-assign]
    error = ""
    try:
        (step1_main if step == 1 else step3_main)(run)
    except Corrupted as found:
        error = str(found)
    finally:
        Keeper.after = after  # type: ignore[method-assign]
        for call in run.at_end:
            call()
    saved = sorted(path.name for path in run.directory.resume(step).glob("step-*"))
    return {"errors": comm.gather_lists([error]), "saved": saved}


def weight(role: str, name: str) -> Spoil:
    return lambda keeper: flip(engines(keeper)[role].module, name)


def engines(keeper: Keeper) -> dict[str, Any]:
    return {**keeper.engines, **(keeper._integrity.engines if keeper._integrity else {})}


def moment(keeper: Keeper) -> None:
    """Adam's first moment of the head, at ZeRO-0."""
    engine = engines(keeper)["model"]
    state = engine.deepspeed.optimizer.state
    weight = next(p for n, p in engine.module.named_parameters() if n.endswith("norm.weight"))
    state[weight]["exp_avg"].view(-1).view(torch.int32)[:1] ^= 1 << 20


def average(keeper: Keeper) -> None:
    keeper.parts["ema"].averages[-1].view(-1).view(torch.int32)[:1] ^= 1 << 20  # type: ignore[attr-defined]


def processor(keeper: Keeper) -> None:
    """Every second forward of the critic computes something else."""
    engine = engines(keeper)["critic"]
    inner, calls = engine.deepspeed, [0]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        found = inner(*args, **kwargs)
        return found + 1e-6 * (calls[0] % 2)

    class Wrong:
        __call__ = staticmethod(wrong)

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

    engine.deepspeed = Wrong()


HEAD, NORM = "layers.1.mlp.down_proj.weight", "layers.0.input_layernorm.weight"
ACTOR3 = {f"step3.{role}.zero_stage": 3 for role in ("actor.engine", "reference_engine")}
CASES: dict[str, tuple[int, Spoil | None, dict[str, Any]]] = {
    "clean-sft": (1, None, {"step1.engine.zero_stage": 2}),
    "clean-ppo": (3, None, {"step3.ppo.ema_decay": 0.9}),
    "clean-zero3": (3, None, {**ACTOR3, "step3.critic.engine.zero_stage": 3}),
    "off": (1, weight("model", HEAD), {"checkpoint.check_every": 0}),
    "sft-zero0": (1, weight("model", HEAD), {}),
    "sft-zero2": (1, weight("model", HEAD), {"step1.engine.zero_stage": 2}),
    "sft-zero3": (1, weight("model", NORM), {"step1.engine.zero_stage": 3}),
    "sft-moment": (1, moment, {}),
    "actor": (3, weight("actor", HEAD), {}),
    "critic": (3, weight("critic", HEAD), {}),
    "reference": (3, weight("reference", HEAD), {}),
    "reward": (3, weight("reward model", HEAD), {}),
    "ema": (3, average, {"step3.ppo.ema_decay": 0.9}),
    "processor": (3, processor, {}),
}  # fmt: skip


def pace(out: Path, case: str) -> dict[str, Any]:
    """Steps of a supervised loop, on rank 1 with a data source that is slow in the case `slow`."""
    sleeps = 0.04 if case == "slow" and comm.rank() == 1 else 0.0
    logs = out / case
    logs.mkdir(exist_ok=True)
    settings = load_config(None, {"launch.straggler_seconds": 0.9}).launch
    said: list[str] = []
    rank_pace = Stragglers(settings, logs, said.append)

    def collate(rows: list[int]) -> torch.Tensor:
        time.sleep(0.01 + sleeps)
        return torch.ones(4)

    def one_step(batches: list[torch.Tensor]) -> dict[str, float]:
        comm.all_reduce(batches[0])
        time.sleep(0.02)
        return {"loss": float(comm.all_reduce(batches[0])[0])}

    rows: list[dict[str, float]] = []
    quiet: Any = SimpleNamespace(metrics_bytes=0, log=lambda found, step: rows.append(found))
    quiet.update = quiet.write = quiet.after = lambda *_, **__: None
    plans = [[[[0]]] * 90]
    work = Supervised(
        1, "SFT", TrainConfig(log_every=5), plans, collate=collate, step=one_step,
        evaluate=dict, shown=(), compared=(), epoch_line=str,
    )  # fmt: skip
    work.train(90, {"step": 0, "evaluation": {}}, quiet, quiet, quiet, rank_pace)
    table = [json.loads(line) for line in (logs / "ranks.jsonl").read_text().splitlines()]
    return {"said": said, "rows": rows[-1], "table": table}


def main() -> None:
    out = Path(sys.argv[1])
    comm.init_distributed()
    torch.manual_seed(0)
    for case in sys.argv[2:]:
        if case in CASES:
            found = run_step(out, case, *CASES[case])
        else:
            found = pace(out, case)
        if comm.rank() == 0:
            (out / f"{case}.json").write_text(json.dumps(found))
        comm.barrier()
    (out / f"done{comm.rank()}").touch()


if __name__ == "__main__":
    try:
        main()
    finally:  # not a normal end: a destructor might wait for the other rank for ever
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(0 if (Path(sys.argv[1]) / f"done{comm.rank()}").exists() else 1)
