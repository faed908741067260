"""One of two gloo ranks: does what the tests in test_engine_ranks.py compare with one rank.

`python -m tests.unit.engine_worker DIR`: DIR/*.pt are written by rank 0, DIR/done by both.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from rlhf import models
from rlhf.algo.advantages import whiten
from rlhf.config.load import load_config
from rlhf.config.resolve import resolve_step
from rlhf.config.schema import EngineConfig
from rlhf.engine import comm
from rlhf.engine.ema import WeightEMA
from rlhf.engine.zero3 import kept_whole
from rlhf.harness import StepRun
from rlhf.rollout import RolloutRequest, SamplingConfig, build_rollout, gathering
from step1_sft.main import sft_step
from step3_ppo.main import main as step3_main
from step3_ppo.update import update
from tests.unit import model_help as help_
from tests.unit.ranks_help import finish
from tests.unit.steps_help import ppo_settings, scored_rollout

DECAY = 0.9


def sft(engine: Any, rows: list[dict[str, Any]], micro: int) -> list[dict[str, float]]:
    """Three optimiser steps on this rank's rows."""
    mine = rows[comm.rank() :: comm.world_size()]
    return [sft_step(engine, help_.sft_batches(mine, micro)) for _ in range(3)]


def stage(out: Path, number: int) -> None:
    settings = EngineConfig(zero_stage=number)
    module = help_.load_policy(engine=settings)
    engine = help_.train_engine(module, engine=settings)
    ema = WeightEMA(engine.module, DECAY)
    expected, stats = help_.weights(engine.module), []
    mine = help_.sft_rows()[comm.rank() :: comm.world_size()]
    for number_of_step in range(3):
        stats.append(sft_step(engine, help_.sft_batches(mine, 2)))
        ema.update()
        if number_of_step == 2:  # nothing gathers the weights between a step and the swap
            with ema.swapped_in():
                averaged = help_.weights(engine.module)
        now = help_.weights(engine.module)
        expected = {k: DECAY * expected[k] + (1 - DECAY) * now[k] for k in now}
    snapshot = models.Snapshot(engine.module)
    if comm.rank() == 0:
        snapshot.write(out / f"zero{number}", help_.tokenizer(), card="")
        torch.save(
            {"stats": stats, "weights": now, "ema": averaged, "ema_expected": expected},
            out / f"stage{number}.pt",
        )  # fmt: skip


def lora(out: Path) -> None:
    """Adapters under ZeRO-3: base bits, merged artifact, adapter."""
    settings = EngineConfig(zero_stage=3)
    module = help_.load_policy(name=help_.lively(), engine=settings, lora={"rank": 2})
    engine = help_.train_engine(module, engine=settings)
    sft(engine, help_.sft_rows(), 2)
    batch = help_.sft_batches(help_.sft_rows(), 8)[0]
    with engine.evaluating():
        live, _ = engine(batch.input_ids, batch.attention_mask, batch.attention_mask)
    snapshot = models.Snapshot(engine.module)
    if comm.rank() == 0:
        snapshot.write(out / "lora", help_.tokenizer(), card="")
        torch.save(live, out / "lora.pt")


def scalar(out: Path) -> None:
    """A new scalar head under ZeRO-3 is the same as without, and trains."""
    settings = EngineConfig(zero_stage=3)
    module = help_.load_value(engine=settings, seed=11)
    state = help_.weights(module)
    if comm.rank() == 0:
        torch.save(state, out / "scalar.pt")


def ppo(out: Path) -> None:
    """PPO epochs of actor and critic with all rows in one minibatch."""
    for number in (0, 3):
        settings = EngineConfig(zero_stage=number)
        actor = help_.train_engine(
            help_.load_policy(name=help_.lively(), engine=settings),
            engine=settings,
            learning_rate=1e-3,
        )
        critic = help_.train_engine(
            help_.load_value(name=help_.reward_dir(), engine=settings, new_head=False),
            engine=settings,
            learning_rate=1e-3,
        )
        rollout = scored_rollout()
        mine = rollout.rows(torch.arange(len(rollout))[comm.rank() :: 2])
        stats = update(
            actor, critic, mine, ppo_settings(), temperature=0.7, micro_batch_size=2, seed=1
        )
        state = [help_.weights(actor.module), help_.weights(critic.module)]
        if comm.rank() == 0:
            torch.save({"stats": stats, "weights": state}, out / f"ppo{number}.pt")


def sums(out: Path) -> None:
    """Whitening, sums, lists and the order of ranks over real gloo."""
    generator = torch.Generator().manual_seed(1)
    x, mask = torch.randn(6, 5, generator=generator), torch.rand(6, 5, generator=generator) < 0.6
    mine = slice(0, 4) if comm.rank() == 0 else slice(4, 6)
    white = comm.gather_lists(whiten(x[mine], mask[mine], comm.all_reduce).tolist())
    total = comm.sum_over_ranks({"b": 1.0 + comm.rank(), "a": 2.0**24 * comm.rank() + 1})
    largest = comm.all_reduce(torch.tensor(float(comm.rank())), "max")
    with comm.rank_zero_first():
        found = (out / "first").exists()
        if comm.rank() == 0:
            time.sleep(0.3)
            (out / "first").touch()
    saw = comm.gather_lists([found])
    lists = comm.gather_lists([f"rank{comm.rank()}"] * (comm.rank() + 1))
    if comm.rank() == 0:
        torch.save(
            {"x": x, "mask": mask, "white": torch.tensor(white), "total": total, "saw": saw,
             "max": float(largest), "lists": lists},
            out / "sums.pt",
        )  # fmt: skip


def uneven_rollout(out: Path) -> None:
    """ZeRO-3: ranks whose answers have different lengths do not wait for each other for ever."""
    settings = EngineConfig(zero_stage=3)
    module = help_.load_policy(name=help_.lively(), engine=settings)
    engine = help_.train_engine(module, engine=settings)
    sampler = build_rollout(
        "continuous", engine.deepspeed, help_.tokenizer(), batch_size=4, seed=1,
        rank=comm.rank(), world=2, gather=lambda: kept_whole(engine.module.parameters()),
    )  # fmt: skip
    ids = torch.randint(3, 200, (2, 6), generator=torch.Generator().manual_seed(4))
    limit = 3 if comm.rank() == 0 else 17
    for _ in range(2):
        made = sampler.generate(
            RolloutRequest(ids, torch.ones_like(ids)), SamplingConfig(max_new_tokens=limit)
        )
        # Training goes on after generating.
        sft_step(engine, help_.sft_batches(help_.sft_rows(4), 2))
    widths = comm.gather_lists([made.answer_mask.shape[1]])
    if comm.rank() == 0:
        torch.save(widths, out / "uneven.pt")


def live(module: Any) -> int:
    """Elements of sharded parameters that are whole on this rank now."""
    return sum(p.ds_numel for p in module.parameters() if p.ds_status == ZeroParamStatus.AVAILABLE)


def layer_by_layer(out: Path) -> None:
    """Answers, losses and what was whole at once, with the policy gathered whole and by layers."""
    eager = out / "eager.json"  # nothing stays gathered longer than its module's forward
    names = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size",
             "param_persistence_threshold")  # fmt: skip
    eager.write_text(json.dumps({"zero_optimization": {f"stage3_{name}": 0 for name in names}}))
    found = {}
    for how in ("always", "never"):
        torch.manual_seed(0)
        zero3 = EngineConfig(zero_stage=3, deepspeed_config=str(eager))
        engine = help_.train_engine(
            help_.load_policy(name=help_.lively(), engine=zero3), engine=zero3
        )
        most: list[int] = []
        for module in engine.module.modules():
            if not list(module.children()):
                count = lambda *_, e=engine, seen=most: seen.append(live(e.module))
                module.register_forward_hook(count)
        sampler = build_rollout(
            "continuous", engine.deepspeed, help_.tokenizer(), batch_size=2, seed=1,
            rank=comm.rank(), world=2, **gathering(how, "continuous", engine.module).options,
        )  # fmt: skip
        rows = 2 if comm.rank() == 0 else 5  # ranks with unequal work
        ids = torch.randint(3, 200, (rows, 6), generator=torch.Generator().manual_seed(4))
        made, losses, whole = [], [], []
        for _ in range(2):
            most.clear()
            with engine.evaluating():
                answers = sampler.generate(
                    RolloutRequest(ids, torch.ones_like(ids)), SamplingConfig(max_new_tokens=12)
                )
            whole.append(max(most, default=0))
            made.append([answers.input_ids, answers.log_probs])
            losses.append(sft_step(engine, help_.sft_batches(help_.sft_rows(4), 2)))
        total = sum(p.ds_numel for p in engine.module.parameters())
        found[how] = comm.gather_lists([(made, losses, whole, total, sampler.stats.idle)])
    if comm.rank() == 0:
        torch.save(found, out / "layers.pt")


def step_3(out: Path) -> None:
    """The whole step, with all models in shards, gathered whole and by layers."""
    for how in ("always", "never"):
        settings = {
            "step3.rollout": {"gather": how, "prompts": 8, "batch_size": 2, "max_new_tokens": 8,
                              "max_prompt_length": 40},
            "step3.actor.engine.zero_stage": 3, "step3.critic.engine.zero_stage": 3,
            "step3.reference_engine.zero_stage": 3, "step3.iterations": 2,
            "step3.micro_batch_size": 4, "step3.eval.prompts": 4, "step3.log_every": 1,
            "data.cache_dir": str(out / "cache"), "track.trackers": [], "data.max_train_rows": 40,
        }  # fmt: skip
        resolved = resolve_step(
            load_config(None, settings), 3, run_dir=out / f"step3-{how}", world_size=2,
            parents={"sft": help_.lively(), "reward": help_.reward_dir()},
        )  # fmt: skip
        run = StepRun(resolved, comm.rank())
        run.step_dir.mkdir(parents=True, exist_ok=True)
        step3_main(run)


PARTS: dict[str, Callable[[Path], None]] = {
    "sums": sums,
    "zero0": lambda out: stage(out, 0),
    "zero2": lambda out: stage(out, 2),
    "zero3": lambda out: stage(out, 3),
    "lora": lora,
    "scalar": scalar,
    "ppo": ppo,
    "uneven": uneven_rollout,
    "layers": layer_by_layer,
    "step3": step_3,
}


def main(out: Path) -> None:
    for name in sys.argv[2:] or PARTS:
        PARTS[name](out)
        comm.barrier()


if __name__ == "__main__":
    finish(main)
