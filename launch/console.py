"""The driver's console: what becomes of it never decides what becomes of the run.

The reader of a pipe may go (`| head`), a terminal may be closed, a file's disk may be full, a
descriptor may be closed from the start, an encoding may lack a character. The run's own log
(`driver.log`) has what a console did not take.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from rlhf.store.files import open_own


class Console:
    """A text stream that never raises for what lies behind it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._log: IO[str] | None = None

    def log_to(self, stream: IO[str]) -> None:
        """From now on everything is written there too, and no more to an earlier one (--seeds)."""
        if self._log is not None:
            self._log.close()
        self._log = stream

    def write(self, text: str) -> int:
        if self._log is not None:
            try:
                self._log.write(text)
                self._log.flush()
            except (OSError, ValueError):  # its disk is full: the console is what is left
                self._log = None
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            self._lost()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._lost()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def _lost(self) -> None:
        """What is still buffered, and all that follows, goes nowhere, now and at exit."""
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, self._stream.fileno())
        except (OSError, ValueError):
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        finally:
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect() -> Sequence[Console]:
    """Puts a Console before standard output and standard error; returns them.

    Python has None for a descriptor that was closed from the start. It is opened to nothing, since
    the next file that is opened, a log or a lock, would get its number otherwise.
    """
    _open_closed()
    made = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Console):
            made.append(stream)
            continue
        if stream is None:
            number = 1 if name == "stdout" else 2
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        made.append(Console(stream))
        setattr(sys, name, made[-1])
    return made


def _open_closed() -> None:
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if descriptor > 2:
            return os.close(descriptor)


def keep_log(path: Path) -> None:
    """The consoles' text goes to `path` too. A disk that refuses costs the log alone."""
    try:
        stream = open_own(path, "a")
    except OSError:
        return
    for console in (sys.stdout, sys.stderr):
        if isinstance(console, Console):
            console.log_to(stream)
