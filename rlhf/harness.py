"""What every step's process does around its `main(run)`: logs, phases, failure records, publishing.

A step script is `if __name__ == "__main__": run_step(1, main)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf import stall
from rlhf.config import step_config
from rlhf.config.schema import ResolvedStep, RunConfig
from rlhf.errors import ArtifactError, Diverged, RequirementError, UserError, at_its_end, with_notes
from rlhf.home import ensure_home
from rlhf.lifeline import Lifeline, adopt_environment
from rlhf.ranklog import RankLog, Tee
from rlhf.redact import printable, redact, redact_tree
from rlhf.store import MANIFEST, RunDir, publish, verify, write_json_atomic
from rlhf.store.files import disk_errors, open_own, remove

OOM_REMEDY = (
    "Out of memory. In this order: halve micro_batch_size (the result stays the same), turn on "
    "model.gradient_checkpointing, use dtype bfloat16, raise the ZeRO stage (--actor-zero-stage "
    "3), train adapters (model.lora.rank 16), engine.offload cpu, or shorter max_length."
)
STALL_REMEDY = (
    "Look at the stacks in the ranks' logs (logs/rankK.log): a judge, a data source or a file "
    "system that does not answer shows there. If it only needs longer, raise launch.stall_timeout. "
    "The same command goes on from the last checkpoint"
)


@dataclass
class StepRun:
    """One process of one step: what it was told, where it writes, what phase it is in."""

    resolved: ResolvedStep
    rank: int
    phase_name: str = "start"
    phase_began: float = field(default_factory=time.perf_counter)
    phases: dict[str, float] = field(default_factory=dict)
    stop: int = 0
    """The signal that told this rank to stop; 0: none did."""
    can_save: bool = False
    """The training loop runs: it stops by itself, with a checkpoint, when `stop` is set."""
    proven: dict[str, str | None] = field(default_factory=dict)
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """Called before the process ends, however `main` did."""

    @property
    def config(self) -> RunConfig:
        return self.resolved.config

    @property
    def directory(self) -> RunDir:
        return RunDir(Path(self.resolved.run_dir))

    @property
    def step_dir(self) -> Path:
        return self.directory.step_dir(self.resolved.step)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what is going on, for the console, for error records and for timings."""
        self.phase_name, self.phase_began, self.can_save = name, time.perf_counter(), False
        stall.mark()
        self.say(f"step {self.resolved.step}: {name}")
        yield
        self.phases = self.seconds_by_phase()
        self.phase_name, self.can_save = f"after {name}", False

    def seconds_by_phase(self) -> dict[str, float]:
        """Seconds of each phase so far, the present one included."""
        now = time.perf_counter() - self.phase_began
        return {**self.phases, self.phase_name: self.phases.get(self.phase_name, 0.0) + now}

    def say(self, text: str) -> None:
        """One line on the console, from rank 0; every rank's log has it."""
        stream = sys.stdout if self.rank == 0 else getattr(sys.stdout, "log", sys.stdout)
        print(printable(text), file=stream, flush=True)

    def parent(self, kind: str) -> str:
        """The directory or hub id that this step starts from, by the artifact's name.

        Rank 0 verifies an artifact of ours: what is corrupt must show before hours of training,
        also where no driver has looked. Raises ArtifactError.
        """
        if kind not in self.resolved.parents:
            raise ArtifactError(
                f"step {self.resolved.step} needs a {kind!r} artifact and was given none: run the "
                "step that makes it, or start this step through train.py, which finds it."
            )
        if self.rank == 0:
            self._prove(kind)
        return self.resolved.parents[kind]

    def _prove(self, kind: str) -> str | None:
        """The manifest's id of a parent that has one; read once, so that what becomes of the
        parent during training costs nothing."""
        if kind not in self.proven:
            place = Path(self.resolved.parents[kind])
            ours = (place / MANIFEST).is_file()
            self.proven[kind] = verify(place).id if ours else None
        return self.proven[kind]

    def parent_records(self) -> dict[str, dict[str, str | None]]:
        """What the manifest says of parents: path, and the manifest id of our own artifacts."""
        return {
            kind: {"path": place, "id": self._prove(kind)}
            for kind, place in self.resolved.parents.items()
        }

    def parent_ids(self) -> dict[str, str | None]:
        """Name -> manifest id of a parent of ours, else its path or hub id."""
        return {kind: self._prove(kind) or place for kind, place in self.resolved.parents.items()}

    def publish(
        self,
        write: Callable[[Path], None],
        *,
        kind: str,
        data_fingerprint: str,
        metrics: dict[str, Any],
        tokenizer_fingerprint: str,
    ) -> None:
        """Rank 0 writes, verifies and renames the artifact; `write` fills a directory."""
        if self.rank != 0:
            return
        manifest = publish(
            self.step_dir,
            write,
            kind=kind,
            step=self.resolved.step,
            parents=self.parent_records(),
            data_fingerprint=data_fingerprint,
            data_sources=self.resolved.data_sources,
            tokenizer_fingerprint=tokenizer_fingerprint,
            config=redact_tree(self.config.model_dump(mode="json")),
            metrics=metrics | {"seconds_by_phase": self.phases},
        )
        self.say(
            f"step {self.resolved.step}: published {kind} {manifest.id[:12]} in {self.step_dir}"
        )
        # What is finished goes on from nothing.
        remove(self.directory.resume(self.resolved.step))


class Stalled(Exception):
    """The rank got nowhere for too long."""


class Stopped(Exception):
    """The training loop has stopped for a signal, after a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def run_step(step: int, main: Callable[[StepRun], None]) -> None:
    """Runs `main` in one rank; ends the process with the exit code that the driver expects.

    A UserError ends with its own code and message; a signal to stop with 128 + its number; anything
    else with 1 and its traceback. Failures leave `logs/rankK.failure.json` for the driver.
    """
    _die_with_launcher()
    adopt_environment(os.environ)
    rank = int(os.environ.get("RANK", "0"))
    try:
        ensure_home(os.environ)
        resolved = step_config(sys.argv[1:], step)
    except UserError as error:
        print(printable(redact(f"error: {error}")), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    run = StepRun(resolved, rank)
    _take_signals(run)
    logs = run.directory.logs(step)
    failure = logs / f"rank{rank}.failure.json"
    try:
        with disk_errors(logs, RequirementError):
            logs.mkdir(parents=True, exist_ok=True)
            failure.unlink(missing_ok=True)
            opened = RankLog(logs / f"rank{rank}.log", sys.stderr)
    except UserError as error:
        print(printable(redact(f"error: {error}")), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    os.environ.setdefault("RLHF_COLLECTIVE_TIMEOUT", str(run.config.launch.collective_timeout))
    lifeline = Lifeline(logs, rank, os.environ)
    lifeline.start()
    with opened as log:
        faulthandler.enable(log.fileno())
        watch = stall.StallWatch(
            run.config.launch.stall_timeout, log.fileno(), lambda why: _give_up(failure, run, why)
        )
        sys.stdout, sys.stderr = Tee(sys.stdout, log), Tee(sys.stderr, log)  # type: ignore[assignment]
        _quiet_libraries()
        watch.start()
        try:
            with only_one(run), at_its_end(run.at_end):
                main(run)
            code = 0
        except Stopped as stopped:
            code = stopped.exit_code
        except UserError as error:
            code = error.exit_code
            _keep_batch(run, error)
            _record(failure, run, error, str(error), code)
            print(printable(f"error: {with_notes(error)}"), file=sys.stderr, flush=True)
        except Exception as error:  # noqa: BLE001 - every failure is recorded for the driver
            code = 1
            _record(failure, run, error, _remedy(error), code)
            traceback.print_exc()
        watch.end()
        sys.stdout.flush()
        sys.stderr.flush()
    faulthandler.disable()
    lifeline.end(finished=code == 0)
    # Not sys.exit: other ranks may wait in a collective for ever while a destructor waits for them.
    os._exit(code)


def _take_signals(run: StepRun) -> None:
    """SIGTERM, SIGINT and SIGUSR1 (Slurm's word before the end of a job's time): the training loop
    saves and stops; elsewhere the process ends at once.

    Launchers repeat SIGTERM, so only a second SIGINT (a person's) is taken as impatience.
    """

    def stop(number: int, frame: Any) -> None:
        impatient = run.stop == number == signal.SIGINT
        run.stop = number
        if impatient or not run.can_save:
            with contextlib.suppress(OSError):
                name = signal.Signals(number).name
                os.write(2, f"stopped by {name} in: {run.phase_name}\n".encode())
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's stays ignored
            signal.signal(number, stop)


@contextlib.contextmanager
def only_one(run: StepRun, wait: float = 90.0) -> Iterator[None]:
    """Rank 0 waits for the processes of an earlier start, which may be saving, to end.

    Raises RequirementError after `wait` seconds. The lock ends with its process, however it dies.
    """
    if run.rank != 0:
        yield
        return
    running = run.step_dir / ".running"
    with disk_errors(running, RequirementError):
        handle = open_own(running, "a+")
    with handle:
        began = time.monotonic()
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                handle.seek(0)
                who = handle.read().strip() or "unknown"
                if time.monotonic() - began > wait:
                    raise RequirementError(
                        f"{run.step_dir}: processes of an earlier start (rank 0: process {who}) "
                        f"still work here after {wait:.0f} s: wait for them or end them, or choose "
                        "another --name"
                    ) from None
                if not told:
                    run.say(f"waiting for process {who} of an earlier start to end")
                    told = True
                time.sleep(0.1)
            except OSError:  # a file system without locks: the user keeps runs apart
                break
        with contextlib.suppress(OSError):  # a full disk: the lock itself holds all the same
            handle.truncate(0)
            handle.write(f"{os.getpid()} {socket.gethostname()}\n")
            handle.flush()
        yield


def put_away(step_dir: Path) -> None:
    """A step starts from its beginning: figures of an earlier try are kept under another name."""
    for name in ("metrics.jsonl", "tensorboard"):
        old = step_dir / name
        if old.exists():
            made = time.strftime("%Y%m%d-%H%M%S", time.localtime(old.stat().st_mtime))
            old.rename(old.with_name(f"{old.stem}.{made}{old.suffix}"))


def _keep_batch(run: StepRun, error: UserError) -> None:
    """The rows on which numbers went wrong, for a look: `diverged/rankK.safetensors`."""
    if not isinstance(error, Diverged) or not error.tensors:
        return
    from safetensors.torch import save_file

    place = run.step_dir / "diverged" / f"rank{run.rank}.safetensors"
    place.parent.mkdir(exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in error.tensors.items()}, place)
    error.args = (f"{error}. The rows are in {place}",)


def _record(path: Path, run: StepRun, error: Exception, remedy: str, code: int) -> None:
    record = {
        "rank": run.rank,
        "phase": run.phase_name,
        "type": type(error).__name__,
        "message": with_notes(error),
        "remedy": remedy,
        "traceback": "".join(traceback.format_exception(error)),
        "exit_code": code,
        "host": socket.gethostname(),
        "time": time.time(),
    }
    try:
        write_json_atomic(path, redact_tree(record))
    except RequirementError as unwritten:  # the disk is full: the console is what is left
        print(f"error: {unwritten}", file=sys.stderr, flush=True)


def _give_up(path: Path, run: StepRun, why: str) -> None:
    """Called in a thread while the main one hangs."""
    error = Stalled(f"rank {run.rank} in {run.phase_name}: {why}")
    _record(path, run, error, STALL_REMEDY, 1)
    with contextlib.suppress(Exception):
        print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _remedy(error: Exception) -> str:
    name, text = type(error).__name__, str(error).lower()
    if (
        name in ("OutOfMemoryError", "MemoryError")
        or "out of memory" in text
        or "can't allocate memory" in text
    ):
        return OOM_REMEDY
    return ""


def _die_with_launcher() -> None:
    """On Linux the kernel ends this process when the one that started it is gone."""
    if sys.platform == "linux" and os.environ.get("LOCAL_RANK") is not None:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _quiet_libraries() -> None:
    """Library chatter goes to no console; their warnings stay, once each, without ours hidden."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    libraries = r"(torch|deepspeed|peft|transformers)\b"
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=libraries)
