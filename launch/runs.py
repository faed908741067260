"""Runs that are there already: found by name, and where each of their steps stands.

Only looks: an artifact's manifest is read, its files are not (`rlhf.store.verify` does that).
"""

from __future__ import annotations

import fcntl
import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from launch import failure
from launch.finished import finished
from rlhf.errors import ArtifactError, RequirementError
from rlhf.redact import redact
from rlhf.stages import PPO, STAGES, Stage, get
from rlhf.store import Manifest, RunDir, read_json, read_manifest
from rlhf.store.checkpoints import newest

FINISHED, GOING_ON, STOPPED, DIED, WAITING = (
    "finished", "going on", "stopped", "died", "not started",
)  # fmt: skip
OUTPUT = "output"
_LOG_END = 16384


@dataclass(frozen=True)
class StepState:
    """Where a step stands."""

    stage: Stage
    state: str
    """FINISHED, GOING_ON, STOPPED (by a signal, on purpose), DIED or WAITING."""
    why: str = ""
    """What is known about its end, in a line."""
    saved: str = ""
    """The checkpoint that it goes on from."""
    manifest: Manifest | None = None
    """Of its artifact; of an earlier start's too, where a later one has not published."""

    def line(self) -> str:
        """The state in words."""
        kept = f"; saved at {self.saved}" if self.saved and self.state != GOING_ON else ""
        return f"{self.state}{f': {self.why}' if self.why else ''}{kept}"


def find_run(given: str, verb: str) -> RunDir:
    """The run of that directory, or of that name below output/. Raises RequirementError."""
    place = Path(given).expanduser().absolute()
    for path in (place, Path(OUTPUT).absolute() / given):
        if is_run(path):
            return RunDir(path)
    there = sorted(path.name for path in Path(OUTPUT).glob("*") if is_run(path))
    known = f" Runs in output/: {', '.join(there)}." if there else ""
    what = "this directory holds no run" if place.is_dir() else "no such run"
    raise RequirementError(
        f"{verb} {given}: {what}.{known} Give the directory that `python train.py` names at its "
        "end, e.g. output/tiny_cpu, or its name"
    )


def is_run(path: Path) -> bool:
    """Does the directory look like one that train.py made?"""
    run = RunDir(path)
    return run.pipeline.is_file() or any(
        (path / stage.folder).is_dir() for stage in STAGES.values()
    )


def records(run: RunDir) -> dict[str, Any]:
    """pipeline.json; empty where it is absent or cannot be read."""
    try:
        found = read_json(run.pipeline)
    except (RequirementError, ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def goes_on(run: RunDir) -> str | None:
    """The command that goes on with the run: the last one that was given; None: not known."""
    asked = records(run).get("asked")
    if not isinstance(asked, list):
        return None
    return shlex.join(["python", "train.py", *map(str, asked)])


def working(run: RunDir) -> bool:
    """Does a driver, or what one left behind, work in the run's directory now? It holds the lock.

    Where the file system has no locks, the answer is no.
    """
    try:
        with open(run.path / ".lock", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def states(run: RunDir) -> list[StepState]:
    """Of each step that was asked for last, and of each one that has a directory, in order."""
    told = [one for one in records(run).get("steps", []) if "step" in one]
    asked = {get(one.get("stage") or one["step"]): one for one in told}
    stages = {*asked, *(stage for stage in STAGES.values() if run.step_dir(stage).is_dir())}
    held = working(run)
    found: list[StepState] = []
    for stage in sorted(stages, key=lambda stage: stage.number):
        earlier_open = any(one.state != FINISHED for one in found)
        found.append(_state(run, stage, asked.get(stage), held and not earlier_open, earlier_open))
    return found


def _state(run: RunDir, stage: Stage, asked: Any, held: bool, waits: bool) -> StepState:
    manifest = finished(run, stage)
    if manifest is not None and not (asked and _is_earlier(run, manifest, asked)):
        return StepState(stage, FINISHED, manifest=manifest)
    found = newest(run.resume(stage))
    saved = found[0].name if found else ""
    older = "; the artifact of an earlier start is there" if manifest is not None else ""
    if held:
        return StepState(stage, GOING_ON, older.lstrip("; "), saved, manifest)
    logs = run.logs(stage)
    if not logs.is_dir() or (waits and not saved and not failure.read_records(logs)):
        return StepState(stage, WAITING, manifest=manifest)
    state, why = _end(run, logs)
    return StepState(stage, state, why + older, saved, manifest)


def _is_earlier(run: RunDir, manifest: Manifest, asked: dict[str, Any]) -> bool:
    """Was the artifact made before a command that was to make it again?"""
    if asked.get("action") != "run":
        return False
    try:
        started = datetime.strptime(str(records(run)["started"]), "%Y-%m-%dT%H:%M:%S%z")
        return datetime.fromisoformat(manifest.created) < started
    except (KeyError, ValueError):
        return False


def _end(run: RunDir, logs: Path) -> tuple[str, str]:
    """How a step ended that has not published: what a rank wrote, what the driver printed."""
    if records := failure.read_records(logs):
        first = records[0]
        phase = f" in {first.phase}" if first.phase else ""
        message = first.message.strip().splitlines()
        text = f"{first.type}: {message[0]}" if message else first.type
        return DIED, redact(f"rank {first.rank}{phase}: {text}")
    try:
        text = run.driver_log().read_bytes()[-_LOG_END:].decode("utf-8", "replace")
        text = text.rpartition("DeepSpeed starts")[2]  # of the last start alone
    except OSError:
        text = ""
    last = [line for line in text.splitlines() if line.startswith(("interrupted", "error:"))]
    if last and last[-1].startswith("interrupted"):
        return STOPPED, redact(last[-1].removeprefix("interrupted").lstrip(": "))
    return DIED, redact(last[-1].removeprefix("error: ")) if last else "without a word (killed?)"


def name_of(stage: Stage) -> str:
    """`step 3 PPO`."""
    return f"{stage} {stage.title}"


def model_place(run: RunDir, role: str) -> str | None:
    """Where the run's "sft" or "reward" model is: made by it, else what its PPO was given; None:
    it has none.

    Raises RequirementError: what PPO was given is another artifact by now, or gone.
    """
    if run.artifact(role).is_dir():
        return str(run.artifact(role))
    policy = finished(run, PPO)
    parent = policy.parents.get(role) if policy is not None else None
    if parent is None:
        return None
    if parent.id is not None and _id(parent.path) != parent.id:
        raise RequirementError(
            f"{run.path}: its PPO was made from the {role} artifact {parent.id[:12]} in "
            f"{parent.path}, which is not there any more"
        )
    return parent.path


def _id(place: str) -> str | None:
    try:
        return read_manifest(place).id
    except ArtifactError:
        return None
