"""A plan in lines and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.schema import RunConfig
from rlhf.plan.advise import (
    Change,
    Machine,
    advise,
    apply,
    as_it_runs,
    fits,
    most_sparing,
    time_with,
)
from rlhf.plan.disk import StepDisk, step_disk
from rlhf.plan.memory import StepMemory, step_memory, summary
from rlhf.plan.roles import Shapes
from rlhf.plan.time import StepTime
from rlhf.stages import Stage


@dataclass(frozen=True)
class StepReport:
    """What one step needs on this machine, and what to change if that does not fit."""

    memory: StepMemory
    time: StepTime
    disk: StepDisk
    fits: bool
    changes: tuple[Change, ...] | None = ()
    """What makes it fit; None: nothing that the planner knows of."""
    after: StepMemory | None = None
    """With those changes; or, where nothing makes it fit, with everything that saves memory."""

    @property
    def stage(self) -> Stage:
        return self.memory.stage


def plan_step(config: RunConfig, stage: Stage, shapes: Shapes, machine: Machine) -> StepReport:
    """`config` as the step gets it (`resolve_step`)."""
    config = as_it_runs(config, stage, shapes, machine)
    memory = step_memory(config, stage, shapes, machine.ranks)
    time = time_with(config, stage, shapes, machine)
    disk = step_disk(config, stage, shapes, machine.ranks)
    if fits(memory, machine):
        return StepReport(memory, time, disk, True)
    changes = advise(config, stage, shapes, machine)
    tried = most_sparing(config, stage, machine) if changes is None else changes
    after = step_memory(apply(config, tried), stage, shapes, machine.ranks)
    return StepReport(memory, time, disk, False, changes, after)


def lines(report: StepReport, machine: Machine) -> list[str]:
    """One line on memory; where it does not fit, one on what to change."""
    memory = report.memory
    parts = ", ".join(f"{name} {size(value)}" for name, value in list(summary(memory).items())[:4])
    where = "process" if machine.ranks.on_cpu else "GPU"
    limit = "" if machine.memory is None else f" of {size(machine.memory)}"
    beside = f"; {size(memory.host)} RAM beside it" if memory.host else ""
    line = f"memory {size(memory.peak)}{limit} per {where} ({memory.worst}: {parts}){beside}"
    if report.fits and (machine.memory is None or memory.peak <= machine.memory):
        return [line]
    verdict = "DOES NOT FIT" if hopeless(report, machine) else "MAY NOT FIT"
    # Planned where the memory was not known: what would help was not looked for.
    return [f"{line}: {verdict}", *([] if report.after is None else [_remedy(report)])]


def _remedy(report: StepReport) -> str:
    assert report.after is not None  # it did not fit, so something was tried
    if not report.changes:
        worst = report.after.moments[report.after.worst].named()
        most = max(worst, key=lambda name: worst[name])
        return (
            f"nothing makes it fit: with all that saves memory {size(report.after.peak)} are left "
            f"({report.after.worst}: {most} {size(worst[most])}). "
            "Use larger devices or a smaller model"
        )
    words = ", ".join(change.words for change in report.changes)
    keys = " ".join(settings(report.changes))
    return f"cheapest change that fits: {words} -> {size(report.after.peak)} ({keys})"


def settings(changes: Sequence[Change]) -> list[str]:
    """`key=value` for the command line."""
    found: dict[str, Any] = {}
    for change in changes:
        found |= change.values
    return [f"{key}={_text(value)}" for key, value in found.items()]


def time_line(report: StepReport) -> str:
    """Seconds of one iteration, and where they go."""
    time = report.time
    shares = {"compute": time.compute, "generate": time.generate, "send": time.send}
    shares["offload"] = time.offload
    named = ", ".join(f"{name} {seconds(value)}" for name, value in shares.items() if value)
    return (
        f"time   {seconds(time.seconds)} per iteration of {time.rows} rows ({named}); "
        f"each rank sends {size(time.sent)}"
    )


def as_json(report: StepReport) -> dict[str, Any]:
    """For machines: bytes, seconds, settings."""
    memory, time = report.memory, report.time
    found: dict[str, Any] = {
        "step": report.stage.number,
        "fits": report.fits,
        "peak_bytes": round(memory.peak),
        "host_bytes": round(memory.host),
        "at": memory.worst,
        "disk": {
            "artifact_bytes": round(report.disk.artifact),
            "checkpoint_bytes": round(report.disk.checkpoint),
            "checkpoints": report.disk.kept,
        },
        "moments": {name: _rounded(parts.named()) for name, parts in memory.moments.items()},
        "iteration": {
            "seconds": time.seconds,
            "compute_seconds": time.compute,
            "generate_seconds": time.generate,
            "send_seconds": time.send,
            "offload_seconds": time.offload,
            "sent_bytes": round(time.sent),
            "rows": time.rows,
        },
    }
    if not report.fits:
        found["change"] = settings(report.changes) if report.changes else None
        found["peak_bytes_after"] = round(report.after.peak) if report.after else None
    return found


def hopeless(report: StepReport, machine: Machine) -> bool:
    """Would even a plan that is 15% too high leave it without room?"""
    return machine.memory is not None and report.memory.peak / 1.15 > machine.memory


def size(value: float) -> str:
    """`12.3 GB` (1e9 bytes)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} bytes"


def seconds(value: float) -> str:
    if value >= 3600:
        return f"{value / 3600:.3g} h"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _rounded(parts: Mapping[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in parts.items()}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
