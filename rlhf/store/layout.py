"""Where things are in a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import ConfigError
from rlhf.stages import STAGES, Stage, get

Which = Stage | str | int  # a stage, its name, or its number


def places() -> dict[str, tuple[Stage, str]]:
    """Name of an artifact, or of a part of one -> (its stage, the directory below the stage's)."""
    found: dict[str, tuple[Stage, str]] = {}
    for stage in STAGES.values():
        found[stage.makes] = (stage, "artifact")
        found |= {part: (stage, f"artifact/{part}") for part in stage.parts}
        if stage.evaluates:
            found["evaluation"] = (stage, "evaluation")
    return found


@dataclass(frozen=True, init=False)
class RunDir:
    """The names of everything in one run's directory; touches no disk."""

    path: Path

    def __init__(self, path: Path | str) -> None:
        object.__setattr__(self, "path", Path(path))

    @property
    def pipeline(self) -> Path:
        """What was asked, versions, command lines."""
        return self.path / "pipeline.json"

    def driver_log(self, role: str = "") -> Path:
        """What the driver printed; one for each node that was started by hand (`role`)."""
        return self.path / f"driver{'.' if role else ''}{role}.log"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def step_dir(self, step: Which) -> Path:
        """Raises ConfigError where there is no such stage."""
        return self.path / get(step).folder

    def artifact(self, name: str) -> Path:
        """The directory of an artifact (sft, ..., evaluation) or of a part of one (actor, ...).

        Raises ConfigError for another name.
        """
        known = places()
        if name not in known:
            raise ConfigError(f"artifact {name!r}: one of {', '.join(known)} is needed")
        stage, below = known[name]
        return self.step_dir(stage) / below

    def resolved(self, step: Which, act: str = "") -> Path:
        """What the step's processes read; `act`: "evaluation", where they only evaluate."""
        return self.step_dir(step) / (f"{act}.resolved.json" if act else "resolved.json")

    def command(self, step: Which, act: str = "") -> Path:
        return self.step_dir(step) / (f"{act}.command.sh" if act else "command.sh")

    def logs(self, step: Which) -> Path:
        return self.step_dir(step) / "logs"

    def metrics(self, step: Which) -> Path:
        return self.step_dir(step) / "metrics.jsonl"

    def resume(self, step: Which) -> Path:
        """DeepSpeed's checkpoints and all other state."""
        return self.step_dir(step) / "resume"
