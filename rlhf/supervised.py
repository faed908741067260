"""The loop that steps 1 and 2 share: epochs of optimiser steps over planned batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf import track
from rlhf.config.schema import TrainConfig
from rlhf.data import StageData
from rlhf.engine.train import TrainEngine
from rlhf.harness import StepRun
from rlhf.resume import Keeper
from rlhf.stragglers import Stragglers

Figures = dict[str, float]  # what was measured; an evaluation on no rows has none
COUNTS = ("tokens", "pairs")
Plans = list[list[list[list[int]]]]  # epoch -> optimiser step -> this rank's micro-batches of rows


def planned_steps(plans: Plans, settings: TrainConfig) -> int:
    """Optimiser steps of all epochs, at most `max_steps`."""
    total = sum(len(plan) for plan in plans)
    return min(total, settings.max_steps or total)


def provenance(rows: dict[str, StageData]) -> dict[str, Any]:
    """What a manifest says of the rows that were trained on and measured on."""
    return {"data": rows["train"].report.to_dict(), "held_out": vars(rows["eval"].held_out)}


def card_lines(figures: Figures, rows: StageData) -> list[str]:
    """What a model card says of an evaluation, and of the rows that it was made on."""
    lines = [rows.held_out.line()]
    for name, value in figures.items():
        if not name.endswith("_before"):
            before = figures.get(f"{name}_before")
            was = "" if before is None else f" ({before:.4f} before training)"
            digits = 0 if name in COUNTS else 4
            lines.append(f"held-out {name} {value:.{digits}f}{was}")
    return lines


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
    compared: tuple[str, ...]  # figures of `evaluate` that are published from before training too
    epoch_line: Callable[[Figures], str]  # what is said of an evaluation with figures

    def run(self, run: StepRun, engine: TrainEngine, data_fingerprint: str) -> Figures:
        """All epochs, or what is left of them after a resume.

        Returns the last evaluation, and `NAME_before` for the figures that are compared: those of
        the model as training found it.
        """
        total = planned_steps(self.plans, self.settings)
        keeper = Keeper(run, {"model": engine}, data_fingerprint=data_fingerprint)
        state = keeper.restore()
        with (
            track.open_tracker(
                run.config.track,
                run.step_dir,
                step=self.number,
                rank=run.rank,
                config=run.config.model_dump(mode="json"),
                keep_bytes=keeper.metrics_bytes,
                done=state.get("step", 0),
            ) as tracker,
            track.progress(total, self.title, run.rank, initial=state.get("step", 0)) as bar,
        ):
            if not state:
                state = {"step": 0, "evaluation": {}, "before": self.measure(0, tracker)}
                bar.write(self.told("before training", state["before"]))
            pace = Stragglers.of(run)
            last = self.train(total, state, keeper, tracker, bar, pace)
        # A checkpoint of an earlier version has no "before", and the model that it was is gone.
        before = state.get("before", {})
        return last | {f"{name}_before": before[name] for name in self.compared if name in before}

    def train(
        self,
        total: int,
        state: dict[str, Any],
        keeper: Keeper,
        tracker: Any,
        bar: Any,
        pace: Stragglers,
    ) -> Figures:
        """The steps after `state["step"]`; returns the last evaluation."""
        places = [
            (epoch, index, index == len(plan) - 1)
            for epoch, plan in enumerate(self.plans)
            for index in range(len(plan))
        ]
        done, evaluation = state["step"], state["evaluation"]
        log_every, eval_every = self.settings.log_every, self.settings.eval_every
        for step, (epoch, index, is_last) in enumerate(places[done:total], done + 1):
            pace.skip()
            batches = [self.collate(rows) for rows in self.plans[epoch][index]]
            pace.lap("data")
            stats = self.step(batches)
            pace.lap("update")
            bar.update(1, **{name: stats[name] for name in self.shown})
            if step % log_every == 0 or step == total:
                figures = {f"train/{key}": value for key, value in stats.items()}
                tracker.log(figures | pace.figures(step), step)
            ends_epoch = is_last or step == total
            if ends_epoch or (eval_every and step % eval_every == 0):
                evaluation = self.measure(step, tracker)
            if ends_epoch:
                bar.write(self.told(f"epoch {epoch + 1}", evaluation))
            keeper.after(
                step,
                state | {"step": step, "evaluation": evaluation},
                metrics_bytes=tracker.metrics_bytes,
                last=step == total,
            )
        return evaluation

    def measure(self, step: int, tracker: Any) -> Figures:
        """One pass over the held-out rows, logged; {} if there are none."""
        found = self.evaluate()
        if found:
            tracker.log({f"eval/{key}": value for key, value in found.items()}, step)
        return found

    def told(self, when: str, found: Figures) -> str:
        """An evaluation as a line for the console."""
        return f"{when}: {self.epoch_line(found) if found else 'not measured, no held-out rows'}"
