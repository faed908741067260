"""The loop that steps 1 and 2 share: epochs of optimiser steps over planned batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf import track
from rlhf.config.schema import TrainConfig
from rlhf.engine.train import TrainEngine
from rlhf.harness import StepRun
from rlhf.resume import Keeper

Figures = dict[str, float]
Plans = list[list[list[list[int]]]]  # epoch -> optimiser step -> this rank's micro-batches of rows


def planned_steps(plans: Plans, settings: TrainConfig) -> int:
    """Optimiser steps of all epochs, at most `max_steps`."""
    total = sum(len(plan) for plan in plans)
    return min(total, settings.max_steps or total)


@dataclass(frozen=True)
class Supervised:
    """What one of the steps does its own way."""

    number: int
    title: str
    settings: TrainConfig
    plans: Plans
    collate: Callable[[list[int]], Any]  # rows -> a micro-batch on the engine's device
    step: Callable[[list[Any]], Figures]  # one optimiser step; its figures have `loss`
    evaluate: Callable[[], Figures]
    shown: tuple[str, ...]  # figures of `step` on the progress line
    epoch_line: Callable[[Figures], str]  # what is said of an evaluation at an epoch's end

    def run(self, run: StepRun, engine: TrainEngine, data_fingerprint: str) -> Figures:
        """All epochs, or what is left of them after a resume; returns the last evaluation."""
        total = planned_steps(self.plans, self.settings)
        keeper = Keeper(run, {"model": engine}, data_fingerprint=data_fingerprint)
        state = keeper.restore()
        done = state.get("step", 0)
        with (
            track.open_tracker(
                run.config.track,
                run.step_dir,
                step=self.number,
                rank=run.rank,
                config=run.config.model_dump(mode="json"),
                keep_bytes=keeper.metrics_bytes,
                done=done,
            ) as tracker,
            track.progress(total, self.title, run.rank, initial=done) as bar,
        ):
            return self.train(total, done, state.get("evaluation", {}), keeper, tracker, bar)

    def train(
        self, total: int, done: int, evaluation: Figures, keeper: Keeper, tracker: Any, bar: Any
    ) -> Figures:
        """Steps done + 1 ... total; `evaluation` is the last one so far."""
        places = [
            (epoch, index, index == len(plan) - 1)
            for epoch, plan in enumerate(self.plans)
            for index in range(len(plan))
        ]
        log_every, eval_every = self.settings.log_every, self.settings.eval_every
        for step, (epoch, index, is_last) in enumerate(places[done:total], done + 1):
            stats = self.step([self.collate(rows) for rows in self.plans[epoch][index]])
            bar.update(1, **{name: stats[name] for name in self.shown})
            if step % log_every == 0 or step == total:
                tracker.log({f"train/{key}": value for key, value in stats.items()}, step)
            ends_epoch = is_last or step == total
            if ends_epoch or (eval_every and step % eval_every == 0):
                evaluation = self.evaluate()
                tracker.log({f"eval/{key}": value for key, value in evaluation.items()}, step)
            if ends_epoch:
                bar.write(f"epoch {epoch + 1}: {self.epoch_line(evaluation)}")
            keeper.after(
                step,
                {"step": step, "evaluation": evaluation},
                metrics_bytes=tracker.metrics_bytes,
                last=step == total,
            )
        return evaluation
