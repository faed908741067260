"""Launching one step of the plan and proving its result."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from launch import failure, heartbeat, nodes, ranks
from launch.gate import KINDS, STEP_NAMES
from launch.plan import StepPlan
from launch.ports import free_port, port_problem
from launch.records import record_step
from launch.spec import LaunchSpec
from launch.standstill import Standstill
from launch.supervise import GRACE_SECONDS, Outcome, supervise
from rlhf.errors import ArtifactError, RequirementError
from rlhf.redact import HIDDEN_SETTINGS
from rlhf.store import MANIFEST, Manifest, RunDir, verify
from rlhf.store.checkpoints import newest
from rlhf.store.files import disk_errors, open_own

MEASURED = {1: "perplexity", 2: "accuracy"}


class Interrupted(Exception):
    """The user ended the run; the step's processes have ended too."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def launch(
    run: RunDir, item: StepPlan, extra_env: dict[str, str], lock: int | None = None
) -> Outcome:
    """Runs the step's processes to their end; `lock` is held until none is left.

    Raises Interrupted, and RequirementError where the disk refuses.
    """
    spec = refresh_port(nodes.with_variables(item.spec, extra_env))
    logs, before = run.logs(item.step), stamp(run, item.step)
    with disk_errors(logs, RequirementError):
        logs.mkdir(parents=True, exist_ok=True)
    if hidden := record_step(run, item, spec):
        spec = replace(spec, env={**spec.env, HIDDEN_SETTINGS: json.dumps(hidden)})
    if spec.leads:
        failure.clear_records(logs)
        heartbeat.clear(logs)
    log = logs / spec.log_name
    with disk_errors(log, RequirementError), open_own(log, "a") as stream:
        stream.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {spec.argv}\n")
    settings = item.resolved.config.launch
    grace = settings.grace_seconds
    still = Standstill(logs, settings.stall_timeout, settings.collective_timeout)
    with nodes.prepared(spec, logs, grace) as (ready, heart):
        outcome = supervise(
            ready,
            log,
            grace=grace,
            on_interrupt=lambda: say_interrupted(item),
            keep=() if lock is None else (lock,),
            heart=heart,
            still=None if heart else still,
        )
    if heart:
        outcome = replace(outcome, spread=True, lost=heart.lost or outcome.lost)
    if outcome.interrupted:
        published = item.act or stamp(run, item.step) != before
        raise Interrupted(_interruption(run, item.step, bool(published)), outcome.interrupted)
    return outcome


def _interruption(run: RunDir, step: int, published: bool) -> str:
    if published:
        return f"step {step} is published; the same command goes on with what comes after it"
    found = newest(run.resume(step))
    if found is None:
        return f"step {step} had saved nothing: the same command starts it again"
    return f"step {step} is saved at {found[0]}: the same command goes on from there"


def say_interrupted(item: StepPlan) -> None:
    """Called in a signal handler: writes past Python's buffers, which may be in use."""
    what = f"the {item.act} is told to" if item.act else f"step {item.step} is told to save and"
    text = f"\ninterrupted: {what} stop (again: stop it at once)\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def refresh_port(spec: LaunchSpec) -> LaunchSpec:
    """A port that was chosen when the plan was made may be taken by now."""
    if spec.nodes is not None:  # not a port of this machine
        return spec
    for position, argument in enumerate(spec.argv):
        name, equals, value = argument.partition("=")
        if name in ("--master_port", "--master-port") and equals and port_problem(int(value)):
            argv = [*spec.argv]
            argv[position] = f"{name}={free_port()}"
            return replace(spec, argv=argv)
    return spec


def stamp(run: RunDir, step: int) -> tuple[int, int] | None:
    """What changes whenever an artifact is published: its manifest's inode and time."""
    path = run.step_dir(step) / "artifact" / MANIFEST
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def prove_result(
    run: RunDir, item: StepPlan, before: tuple[int, int] | None, outcome: Outcome
) -> Manifest:
    """The manifest that this launch published; an exit code alone proves nothing.

    Raises StepFailed, or the ConfigError or RequirementError that a rank recorded.
    """
    step, logs = item.step, run.logs(item.step)
    manifest, problem = published_since(run, step, before)
    absent = ranks.unfinished(logs, item.resolved.world_size, wait=item.spec.nodes is not None)
    if manifest is None or absent or failure.read_records(logs):
        raise failure.explain(step, outcome, logs, problem, absent)
    return manifest


def published_since(
    run: RunDir, step: int, before: tuple[int, int] | None
) -> tuple[Manifest | None, str]:
    """(the manifest of an artifact that verifies and is not the one of `before`, ""), or (None,
    what is wrong)."""
    artifact = run.step_dir(step) / "artifact"
    try:
        manifest = verify(artifact, KINDS[step])
    except ArtifactError as error:
        return None, str(error)
    if stamp(run, step) == before:
        return None, f"{artifact} is that of an earlier run, none was published"
    return manifest, ""


def describe_result(item: StepPlan, manifest: Manifest, outcome: Outcome) -> str:
    """One or two lines about a finished step."""
    text = (
        f"step {item.step} done: {STEP_NAMES[item.step]} artifact {manifest.id[:12]}, "
        f"{outcome.seconds:.0f} s{_measured(item.step, manifest.metrics)}"
    )
    if outcome.code != 0:
        # The artifact was published and verifies; what died afterwards cost nothing.
        text += f"\nwarning: after publishing, {failure.ending(outcome.code)}; see {outcome.log}"
    return text


def _measured(step: int, metrics: Mapping[str, Any]) -> str:
    """A step's figure on held-out rows, after training and before; nothing if it has none."""
    name = MEASURED.get(step, "")
    if metrics.get("held_out", {}).get("rows") == 0:
        return ", not measured (no held-out rows)"
    if metrics.get(name) is None:
        return ""
    after, before = (
        None if metrics.get(key) is None else f"{float(metrics[key]):.4g}"
        for key in (name, f"{name}_before")
    )
    return f", held-out {name} {after}" + (f" (before training {before})" if before else "")


@contextlib.contextmanager
def locked(directory: Path, role: str = "", grace: float = GRACE_SECONDS) -> Iterator[int]:
    """One driver per run directory; where each node is started by hand, one per node (`role`).

    Yields the lock's descriptor.

    The system frees the lock when all who have the descriptor are gone, however they died: the
    driver, and the guard of the step that it started. Where only such a guard is left, its end is
    waited for, `grace` seconds and some. Raises RequirementError if another driver works here, or
    the disk refuses.
    """
    with disk_errors(directory, RequirementError):
        directory.mkdir(parents=True, exist_ok=True)
        handle = open_own(directory / (f".lock.{role}" if role else ".lock"), "a+")
    with handle:
        _take(handle, directory, grace)
        with contextlib.suppress(OSError):  # a full disk: the lock itself holds all the same
            handle.truncate(0)
            handle.write(f"{os.getpid()} {platform.node()}\n")
            handle.flush()
        yield handle.fileno()


def _take(handle: IO[str], directory: Path, grace: float) -> None:
    deadline = time.monotonic() + grace + 10
    told = False
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            owner = handle.read().strip()
            if _works(owner) or time.monotonic() > deadline:
                raise RequirementError(
                    f"{directory}: another train.py is working in this run directory (process "
                    f"{owner or 'unknown'}): wait for it to end, or choose another --name"
                ) from error
        except OSError as error:
            # A file system without locks (some NFS mounts): there the user keeps runs apart.
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return None
            raise
        if not told:
            print("waiting for the processes of a run that was killed here to end", flush=True)
            told = True
        time.sleep(0.1)


def _works(owner: str) -> bool:
    """Is the driver that wrote its number into the lock alive, as far as this machine can know?"""
    number, _, host = owner.partition(" ")
    if not number.isdigit() or host != platform.node():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return not _is_zombie(int(number))


def _is_zombie(pid: int) -> bool:
    """Ended, and its parent has not asked how: a number without a process."""
    try:
        # "pid (name) state ...": the name may hold spaces and brackets
        stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:  # not Linux, or gone meanwhile: the next look will tell
        return False
    return stat[:1] == [b"Z"]
