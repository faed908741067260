"""Progress on the console: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, TextIO

from tqdm import tqdm


class Progress(Protocol):
    """Also a context manager that calls `close`."""

    def update(self, n: int = 1, **numbers: float) -> None:
        """`n` more are done; `numbers` are shown beside."""

    def write(self, text: str) -> None:
        """Prints a line without breaking the bar."""

    def close(self) -> None:
        """Shows the last state; a second call does nothing."""

    def __enter__(self) -> Progress: ...

    def __exit__(self, *_: object) -> None: ...


def progress(
    total: int | None,
    desc: str,
    rank: int,
    *,
    initial: int = 0,
    stream: TextIO | None = None,
    every: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Progress of `total` things on rank 0, nothing on others. `initial`: done before a resume.

    Writes to `stream` (stderr). Where that is no terminal, a line at most every `every` seconds,
    and one at the end.
    """
    if rank != 0:
        return _Silent()
    stream = stream or sys.stderr
    if stream.isatty():
        return _Bar(total, desc, initial, stream)
    return _Lines(total, desc, initial, stream, every, clock)


class _Closing(ABC):
    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Silent(_Closing):
    def update(self, n: int = 1, **numbers: float) -> None:
        pass

    def write(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Bar(_Closing):
    def __init__(self, total: int | None, desc: str, initial: int, stream: TextIO) -> None:
        self._stream = stream
        self._bar = tqdm(
            total=total,
            desc=desc,
            initial=initial,
            file=stream,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def update(self, n: int = 1, **numbers: float) -> None:
        if numbers:
            self._bar.set_postfix_str(_text(numbers), refresh=False)
        self._bar.update(n)

    def write(self, text: str) -> None:
        tqdm.write(text, file=self._stream)

    def close(self) -> None:
        self._bar.refresh()
        self._bar.close()


class _Lines(_Closing):
    def __init__(
        self,
        total: int | None,
        desc: str,
        initial: int,
        stream: TextIO,
        every: float,
        clock: Callable[[], float],
    ) -> None:
        self._total, self._desc, self._initial, self._done = total, desc, initial, initial
        self._stream, self._every, self._clock = stream, every, clock
        self._start = clock()
        self._printed_at, self._printed = float("-inf"), initial
        self._numbers: dict[str, float] = {}
        self._closed = False

    def update(self, n: int = 1, **numbers: float) -> None:
        self._done += n
        self._numbers.update(numbers)
        if self._clock() - self._printed_at >= self._every:
            self._print()

    def write(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if not self._closed and self._printed != self._done:
            self._print()
        self._closed = True

    def _print(self) -> None:
        now = self._clock()
        self._printed_at, self._printed = now, self._done
        parts = [f"{self._desc}: {self._done}"]
        if self._total:
            parts[0] += f"/{self._total} ({100 * self._done / self._total:.0f}%)"
        if self._numbers:
            parts.append(_text(self._numbers))
        passed, steps = now - self._start, self._done - self._initial
        times = f"{_clock_text(passed)} passed"
        if self._total and steps > 0 and self._done < self._total:
            times += f", {_clock_text(passed / steps * (self._total - self._done))} left"
        self.write(" | ".join([*parts, times]))


def _text(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
