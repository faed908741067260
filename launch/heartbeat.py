"""The driver's side of rlhf/lifeline.py: counts while it lives, ends a step that lost a rank."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.lifeline import BEAT_FILE, ENDED, INTERVAL_SECONDS, STOP

# A rank that failed has written why; the others get so long to end by themselves.
GRACE_SECONDS = 5.0
# After the launcher's end: ranks elsewhere read "ended" within a second or two.
DRAIN_SECONDS = 8.0
# Told to stop before any rank runs: there is nothing to save.
NOBODY_SECONDS = 3.0


@dataclass(frozen=True)
class RankFile:
    """What a rank wrote of itself (rankK.alive, rankK.done.json)."""

    rank: int
    host: str
    count: int = 0
    ended: bool = False
    pid: int = 0


def read_ranks(logs: Path, ending: str) -> dict[int, RankFile]:
    """Rank -> its file `rankK{ending}`."""
    found = {}
    for path in logs.glob(f"rank*{ending}"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            rank = int(content["rank"])
            # The time changes with each sign of life, also where a full disk allows no writing.
            count, ended = path.stat().st_mtime_ns, bool(content.get("ended"))
            pid = int(content.get("pid", 0))
            found[rank] = RankFile(rank, str(content["host"]), count, ended, pid)
    return found


def clear(logs: Path) -> None:
    """Removes what an earlier launch left."""
    for pattern in ("rank*.alive", "rank*.done.json", BEAT_FILE):
        for path in logs.glob(pattern):
            path.unlink(missing_ok=True)


class Heartbeat:
    """Counts in `driver.beat` from a thread, and looks after the ranks.

    `lost` says why the step was ended, if it was.
    """

    def __init__(self, logs: Path, timeout: float, grace: float) -> None:
        self.logs, self.timeout, self.grace = logs, timeout, grace
        self.lost = ""
        self._file = logs / BEAT_FILE
        self._over = threading.Event()
        self._kill: Callable[[], None] = lambda: None
        self._stop_at: float | None = None
        self._failed_at: float | None = None
        self._seen: dict[int, tuple[int, float]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def launched(self, kill: Callable[[], None]) -> None:
        """The launcher runs now; `kill` ends it."""
        self._kill = kill

    def stop(self) -> None:
        """All ranks are to save and end (within a second or two they know). For signal handlers."""
        self._stop_at = self._stop_at or time.monotonic()

    def start(self) -> None:
        _write(self._file, "0")
        self._thread.start()

    def end(self) -> None:
        """Tells the ranks that are left to end, and waits until they have, for some seconds."""
        self._over.set()
        self._thread.join()
        if self._stop_at is not None:  # their launcher may have gone while they still save
            self._wait_until_still(self.grace)
        with contextlib.suppress(OSError):
            _write(self._file, ENDED)
        self._wait_until_still(DRAIN_SECONDS)

    def _wait_until_still(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._moving() and time.monotonic() < deadline:
            time.sleep(0.2)

    def _moving(self) -> bool:
        """Is there a rank that may still be alive? A dead one's count stands still."""
        now = time.monotonic()
        return any(now - at < 3 * INTERVAL_SECONDS for _, at in self._look().values())

    def _look(self) -> dict[int, tuple[int, float]]:
        """Rank -> (its count, when that changed last, by this machine's clock); not if it ended."""
        now, found = time.monotonic(), read_ranks(self.logs, ".alive")
        found = {rank: file for rank, file in found.items() if not file.ended}
        for rank, file in found.items():
            count, at = self._seen.get(rank, (-1, now))
            self._seen[rank] = (file.count, now if file.count != count else at)
        self._seen = {rank: seen for rank, seen in self._seen.items() if rank in found}
        return self._seen

    def _run(self) -> None:
        count, killed = 0, False
        while not self._over.wait(INTERVAL_SECONDS):
            count += 1
            with contextlib.suppress(OSError):
                _write(self._file, f"{STOP} {count}" if self._stop_at else str(count))
            if not killed and self._must_end():
                killed = True
                self._kill()

    def _must_end(self) -> bool:
        if self._stop_at is not None:
            waited = time.monotonic() - self._stop_at
            return waited > (self.grace if self._moving() else NOBODY_SECONDS)
        self.lost = self._judge()
        return bool(self.lost)

    def _judge(self) -> str:
        """Why the step cannot go on; empty while it can."""
        now = time.monotonic()
        if any(self.logs.glob("rank*.failure.json")):
            self._failed_at = self._failed_at or now
            if now - self._failed_at > GRACE_SECONDS:
                return "a rank has failed"
        for rank, (_, at) in self._look().items():
            if now - at > self.timeout:
                host = read_ranks(self.logs, ".alive").get(rank)
                return (
                    f"rank {rank}{f' on {host.host}' if host else ''} has given no sign of life "
                    f"for {self.timeout:g} s"
                )
        return ""


@contextlib.contextmanager
def beating(logs: Path, timeout: float, grace: float) -> Iterator[Heartbeat]:
    """A heartbeat for the time of one launch."""
    heart = Heartbeat(logs, timeout, grace)
    heart.start()
    try:
        yield heart
    finally:
        heart.end()


def _write(path: Path, text: str) -> None:
    """By rename; on a full disk the time of the old file changes, which is a sign of life too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        os.utime(path)
