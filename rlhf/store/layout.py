"""Where things are in a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import ConfigError

STEP_DIRS = {1: "step1_sft", 2: "step2_reward", 3: "step3_ppo"}

# name -> (step, directory below the step's); actor, critic and actor_ema are parts of "ppo"
ARTIFACTS = {
    "sft": (1, "artifact"),
    "reward": (2, "artifact"),
    "ppo": (3, "artifact"),
    "evaluation": (3, "evaluation"),
    "actor": (3, "artifact/actor"),
    "critic": (3, "artifact/critic"),
    "actor_ema": (3, "artifact/actor_ema"),
}


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

    def step_dir(self, step: int) -> Path:
        """Raises ConfigError unless step is 1, 2 or 3."""
        if step not in STEP_DIRS:
            raise ConfigError(f"step {step}: the steps are 1, 2 and 3")
        return self.path / STEP_DIRS[step]

    def artifact(self, name: str) -> Path:
        """The directory of an artifact (sft, ..., evaluation) or of a part of one (actor, ...).

        Raises ConfigError for another name.
        """
        if name not in ARTIFACTS:
            raise ConfigError(f"artifact {name!r}: one of {', '.join(ARTIFACTS)} is needed")
        step, below = ARTIFACTS[name]
        return self.step_dir(step) / below

    def resolved(self, step: int, act: str = "") -> Path:
        """What the step's processes read; `act`: "evaluation", where they only evaluate."""
        return self.step_dir(step) / (f"{act}.resolved.json" if act else "resolved.json")

    def command(self, step: int, act: str = "") -> Path:
        return self.step_dir(step) / (f"{act}.command.sh" if act else "command.sh")

    def logs(self, step: int) -> Path:
        return self.step_dir(step) / "logs"

    def metrics(self, step: int) -> Path:
        return self.step_dir(step) / "metrics.jsonl"

    def resume(self, step: int) -> Path:
        """DeepSpeed's checkpoints and all other state."""
        return self.step_dir(step) / "resume"
