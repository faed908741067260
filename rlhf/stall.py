"""A rank that gets nowhere: it says where it stands, and ends.

Whoever gets somewhere calls `mark`: a phase begins, a model reads a micro-batch, a token is
generated, rows are read. A thread looks at the time of the last mark. A judge, a data source or a
file system that never answers holds up its own rank, and the others in a collective operation: all
of them come to their limit and write their stacks. Standard library only.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable
from typing import Any

LOOK_SECONDS = 1.0
_last = time.monotonic()


def mark() -> None:
    """Something was done."""
    global _last
    _last = time.monotonic()


def idle_seconds() -> float:
    """Since the last mark; a suspended machine's time does not count."""
    return time.monotonic() - _last


class StallWatch:
    """Looks after this rank from `start` to `end`; after `limit` seconds without a mark it writes
    the stack of every thread to `log` and calls `stalled` with what to say, once."""

    def __init__(self, limit: float, log: Any, stalled: Callable[[str], None]) -> None:
        self.limit, self._log, self._stalled = limit, log, stalled
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="stall-watch")

    def start(self) -> None:
        """0 seconds: nothing is watched."""
        mark()
        if self.limit > 0:
            self._thread.start()

    def end(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(min(LOOK_SECONDS, self.limit / 4)):
            now = time.monotonic()
            if now - looked > 10 * LOOK_SECONDS:  # this process itself was stopped meanwhile
                mark()
            looked = now
            if idle_seconds() > self.limit:
                faulthandler.dump_traceback(file=self._log, all_threads=True)
                self._stalled(
                    f"no progress for {self.limit:g} s (launch.stall_timeout): where each thread "
                    "stands is at the end of this rank's log"
                )
                return
