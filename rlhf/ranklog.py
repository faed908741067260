"""What a rank prints goes to its console and to `logs/rankK.log`; neither may cost the run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, TextIO

from rlhf.redact import redact
from rlhf.store.files import open_own, room_remedy


class RankLog:
    """A rank's log file: whole lines instead of bars, no secrets, each piece written at once.

    A disk that takes no more is told once on the console; what it missed is lost, the run is not.
    """

    def __init__(self, path: Path, console: TextIO) -> None:
        self.path, self.console = path, console
        self._stream = open_own(path, "ab")
        self._told = False

    def write(self, text: str) -> int:
        data = redact(text.replace("\r", "\n")).encode("utf-8", "backslashreplace")
        try:
            self._stream.write(data)
        except OSError as error:
            if not self._told:
                self._told = True
                print(
                    f"warning: {self.path}: cannot be written ({error.strerror}): the console "
                    f"alone has what follows; {room_remedy(self.path)}",
                    file=self.console,
                    flush=True,
                )
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def fileno(self) -> int:
        return self._stream.fileno()

    def __enter__(self) -> RankLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


class Tee:
    """Writes to the console and to the rank's log, without secrets."""

    def __init__(self, console: TextIO, log: RankLog) -> None:
        self.console, self.log = console, log

    def write(self, text: str) -> int:
        # A launcher that was killed has taken the console with it, or its disk is full, or its
        # encoding lacks a character; the log goes on.
        with contextlib.suppress(OSError, ValueError):
            self.console.write(redact(text))
        self.log.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.console.flush()

    def isatty(self) -> bool:
        return self.console.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)
