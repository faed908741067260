"""Runs one command: output to console and log alike, signals forwarded, nobody orphaned."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from launch import guard
from launch.heartbeat import Heartbeat
from launch.spec import LaunchSpec
from launch.standstill import Standstill
from rlhf.redact import RedactedStream
from rlhf.store.files import open_own, room_remedy

GRACE_SECONDS = 15.0
TAIL_BYTES = 200_000
LOOK_SECONDS = 0.5  # how often it is asked whether the guard lives
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `code` below 0: minus the signal that ended it, as far as known."""

    code: int
    interrupted: int
    """The signal that told the driver to stop; 0: none did."""
    seconds: float
    log: Path
    log_start: int
    """Where this command's output begins in the log."""
    unlogged: bytes = b""
    """The end of what a full disk kept out of the log."""
    spread: bool = False
    """Did it start processes on other nodes?"""
    lost: str = ""
    """Why the driver ended it, where a rank was lost (launch/heartbeat.py)."""

    def output(self, most: int = TAIL_BYTES) -> str:
        """The end of what the command printed."""
        with self.log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(self.log_start, size - most))
            printed = stream.read() + self.unlogged
        return printed[-most:].decode("utf-8", errors="replace")


def supervise(
    spec: LaunchSpec,
    log: Path,
    *,
    grace: float = GRACE_SECONDS,
    console: BinaryIO | None = None,
    on_interrupt: Callable[[], None] = lambda: None,
    keep: Sequence[int] = (),
    heart: Heartbeat | None = None,
    still: Standstill | None = None,
) -> Outcome:
    """Runs the command until it and everything that it started has ended.

    The guard that sees to it has the descriptors `keep` open until then, the command has not.

    Call from the main thread: it takes the signals of _FORWARDED meanwhile. The first one asks the
    command's processes to end and they are killed after `grace` seconds; a second one kills now.
    With a heart (processes on other nodes) the first one reaches all ranks through it, so that all
    save together; it ends the launcher when their time is over.

    Where the guard itself is killed, this process inherits the command and ends it the same way.
    Where a process stands still (`still`), all are told to save and end.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    watched = [sys.executable, "-I", guard.__file__, str(os.getpid()), str(grace), *spec.argv]
    with _Record(log) as record:
        start = record.start
        with _signals() as state, _heir() as heir:
            child = subprocess.Popen(
                watched,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=spec.cwd,
                env=spec.environment(os.environ),
                start_new_session=True,
                pass_fds=tuple(keep),
            )
            if heart is not None:
                heart.launched(child.terminate)
            heir.attach(child, grace, heart)
            state.attach(child, on_interrupt, heart, heir)
            look = (
                (lambda: None) if still is None else partial(still.look, child.pid, child.terminate)
            )
            _tee(child, record, console or _console(), state, heir, look)
            code = child.wait()
            heir.end()
    return Outcome(
        code=signal_code(code),
        interrupted=state.interrupted,
        seconds=time.monotonic() - started,
        log=log,
        log_start=start,
        unlogged=bytes(record.unlogged),
        lost=heir.why or (still.why if still else ""),
    )


def signal_code(code: int) -> int:
    """An exit code with the ways to say "killed by a signal" brought into one: -signal.

    Shells and the guard say 128 + signal; deepspeed's launcher passes -signal on modulo 256.
    """
    if 128 < code <= 128 + 64:
        return 128 - code
    return code - 256 if code > 192 else code


class _Heir:
    """Takes over from a guard that was killed: ends what it left, which this process inherits."""

    def __init__(self) -> None:
        self.why = ""
        self._guard: subprocess.Popen[bytes] | None = None
        self._grace = 0.0
        self._heart: Heartbeat | None = None
        self._kill_at: float | None = None
        self._left: set[int] = set()

    def attach(self, child: subprocess.Popen[bytes], grace: float, heart: Heartbeat | None) -> None:
        self._guard, self._grace, self._heart = child, grace, heart

    def look(self) -> None:
        """Call now and then while the command's output is open."""
        if self._guard is None or (self._guard.poll() or 0) >= 0:  # a guard exits by itself
            return
        if self._kill_at is None:
            self.stop()
        elif time.monotonic() > self._kill_at:
            self.kill()

    def stop(self) -> None:
        """Ranks are told to save and end; a second time, or after the grace period: killed."""
        if self._kill_at is not None:
            return self.kill()
        assert self._guard is not None
        self._kill_at = time.monotonic() + self._grace
        self.why = (
            f"the process that guards it ({self._guard.pid}, launch/guard.py) was killed from "
            "outside; its ranks were told to save and end"
        )
        if self._heart is not None:
            self._heart.stop()
        guard.ask_to_stop(self._below())

    def kill(self) -> None:
        guard.signal_these(self._below(), signal.SIGKILL)

    def end(self) -> None:
        """The output is closed: what the guard left is ended and reaped."""
        if self._guard is not None and self._guard.returncode < 0:
            self.kill()
        for pid in self._left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _below(self) -> list[int]:
        assert self._guard is not None
        mark = f"{guard.GUARD}={self._guard.pid} "  # this process may have other children
        below = guard.descendants(os.getpid())
        found = [pid for pid in below if guard.has_variable(pid, mark)]
        self._left.update(found)
        return found


@contextlib.contextmanager
def _heir() -> Iterator[_Heir]:
    """While it is open, children of a guard that dies become this process's own (Linux)."""
    guard.prctl(guard.PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield _Heir()
    finally:
        guard.prctl(guard.PR_SET_CHILD_SUBREAPER, 0)


class _State:
    """What the signal handlers know: they must not wait, nor raise in the middle of a write."""

    def __init__(self) -> None:
        self.interrupted = 0
        self.pending = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._announce: Callable[[], None] = lambda: None
        self._heart: Heartbeat | None = None
        self._heir: _Heir | None = None

    def attach(
        self,
        child: subprocess.Popen[bytes],
        announce: Callable[[], None],
        heart: Heartbeat | None,
        heir: _Heir,
    ) -> None:
        self._child, self._announce, self._heart, self._heir = child, announce, heart, heir
        for number in range(self.pending):
            self._tell(first=number == 0)

    def _tell(self, first: bool) -> None:
        if first and self._heart is not None:
            self._heart.stop()
        elif self._child is not None and self._child.returncode is None:
            self._child.send_signal(signal.SIGTERM)
        elif self._heir is not None:  # the guard is gone
            self._heir.stop()

    def handle(self, number: int, frame: Any) -> None:
        first, self.interrupted = not self.interrupted, self.interrupted or number
        self.pending += 1
        self._tell(first)
        if first:
            self._announce()


@contextlib.contextmanager
def _signals() -> Iterator[_State]:
    state = _State()
    # A signal that is ignored (nohup) stays ignored.
    taken = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, state.handle) for number in taken}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Record:
    """The log file, unbuffered. What a full disk does not take is kept in memory, its end at
    least: it is needed to say why the step failed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = open_own(path, "ab")
        self.start = self._stream.tell()
        self.unlogged = bytearray()

    def write(self, data: bytes) -> str | None:
        """Why the disk does not take it, the first time; else None."""
        written = 0
        try:
            while written < len(data):
                written += self._stream.write(data[written:])
        except OSError as error:
            first = not self.unlogged
            self.unlogged += data[written:]
            del self.unlogged[:-TAIL_BYTES]
            return f"{self.path}: cannot be written ({error.strerror})" if first else None
        return None

    def __enter__(self) -> _Record:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _tee(
    child: subprocess.Popen[bytes],
    record: _Record,
    console: BinaryIO | None,
    state: _State,
    heir: _Heir,
    look: Callable[[], None],
) -> None:
    """Bytes as they come, so that a progress line's `\\r` works. After an interrupt: log only."""
    assert child.stdout is not None
    descriptor = child.stdout.fileno()
    redacted = RedactedStream()
    with child.stdout:
        ended = False
        while not ended:
            heir.look()
            look()
            if not select.select([descriptor], [], [], LOOK_SECONDS)[0]:
                continue
            chunk = os.read(descriptor, 65536)
            ended = not chunk
            chunk = redacted.end() if ended else redacted.feed(chunk)
            if problem := record.write(chunk):
                text = (
                    f"\nwarning: {problem}: only the console has what follows; "
                    f"{room_remedy(record.path)}\n"
                )
                chunk += text.encode()
            if console is None or state.interrupted:
                continue
            try:
                console.write(chunk)
                console.flush()
            except (OSError, ValueError):
                console = None  # its reader has gone, or its file is full; the log goes on


def _console() -> BinaryIO | None:
    sys.stdout.flush()
    return getattr(sys.stdout, "buffer", None)
