"""Runs one command: output to console and log alike, signals forwarded, nobody orphaned."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from launch import guard
from launch.heartbeat import Heartbeat
from launch.spec import LaunchSpec
from rlhf.redact import RedactedStream

GRACE_SECONDS = 15.0
TAIL_BYTES = 200_000
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
) -> Outcome:
    """Runs the command until it and everything that it started has ended.

    The guard that sees to it has the descriptors `keep` open until then, the command has not.

    Call from the main thread: it takes SIGINT, SIGTERM and SIGHUP meanwhile. The first one asks the
    command's processes to end and they are killed after `grace` seconds; a second one kills now.
    With a heart (processes on other nodes) the first one reaches all ranks through it, so that all
    save together; it ends the launcher when their time is over.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    watched = [sys.executable, "-I", guard.__file__, str(os.getpid()), str(grace), *spec.argv]
    with _Record(log) as record:
        start = record.start
        with _signals() as state:
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
            state.attach(child, on_interrupt, heart)
            _tee(child, record, console or _console(), state)
            code = child.wait()
    seconds = time.monotonic() - started
    return Outcome(
        signal_code(code), state.interrupted, seconds, log, start, bytes(record.unlogged)
    )


def signal_code(code: int) -> int:
    """An exit code with the ways to say "killed by a signal" brought into one: -signal.

    Shells and the guard say 128 + signal; deepspeed's launcher passes -signal on modulo 256.
    """
    if 128 < code <= 128 + 64:
        return 128 - code
    return code - 256 if code > 192 else code


class _State:
    """What the signal handlers know: they must not wait, nor raise in the middle of a write."""

    def __init__(self) -> None:
        self.interrupted = 0
        self.pending = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._announce: Callable[[], None] = lambda: None
        self._heart: Heartbeat | None = None

    def attach(
        self,
        child: subprocess.Popen[bytes],
        announce: Callable[[], None],
        heart: Heartbeat | None,
    ) -> None:
        self._child, self._announce, self._heart = child, announce, heart
        for number in range(self.pending):
            self._tell(first=number == 0)

    def _tell(self, first: bool) -> None:
        if first and self._heart is not None:
            self._heart.stop()
        elif self._child is not None:
            self._child.send_signal(signal.SIGTERM)

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
        self._stream = path.open("ab", buffering=0)
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
    child: subprocess.Popen[bytes], record: _Record, console: BinaryIO | None, state: _State
) -> None:
    """Bytes as they come, so that a progress line's `\\r` works. After an interrupt: log only."""
    assert child.stdout is not None
    descriptor = child.stdout.fileno()
    redacted = RedactedStream()
    with child.stdout:
        ended = False
        while not ended:
            chunk = os.read(descriptor, 65536)
            ended = not chunk
            chunk = redacted.end() if ended else redacted.feed(chunk)
            if problem := record.write(chunk):
                text = f"\nwarning: {problem}: only the console has what follows; free some space\n"
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
