"""Processes of a step on this machine that stand still, seen from outside.

A rank's own watch (rlhf/stall.py) is a thread of it: it stands still too when the process is
stopped, frozen or computes without letting other threads run. The driver looks at /proc, and at the
signs of life that ranks leave in `logs/rankK.alive` (rlhf/lifeline.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from launch import guard
from launch.heartbeat import read_ranks

LOOK_SECONDS = 2.0
MARGIN_SECONDS = 30.0  # a rank whose threads run ends itself first, with its stacks in its log
EARLIER = 0.75
STACKS_SECONDS = 2.0
STATES = {
    b"D": "it waits for a disk or a file system",
    b"R": "it computes without letting its other threads run",
    b"S": "it waits without letting its other threads run, or is frozen",
}
STOPPED = b"T", b"t"


class Standstill:
    """Ends a step one of whose processes does nothing for `limit` seconds; 0: for ever.

    `why` says it, once it has happened. The other ranks give up after `limit` (rlhf/stall.py) or
    `collective_timeout` seconds of waiting: a stopped process is ended before, to name the cause
    and not its echo, and so that all can save.
    """

    def __init__(self, logs: Path, limit: float, collective_timeout: float) -> None:
        self.why = ""
        self._logs, self._limit = logs, limit
        self._stopped_limit = EARLIER * min(limit, collective_timeout)
        self._looked = time.monotonic()
        self._stopped: dict[int, float] = {}  # pid -> since when
        self._silent: dict[int, tuple[int, float]] = {}  # rank -> (its count, since when)

    def look(self, root: int, stop: Callable[[], None]) -> None:
        """Call often. `root`: the step's first process, the guard; `stop` tells it to end all."""
        now = time.monotonic()
        passed = now - self._looked
        if self.why or not self._limit or passed < LOOK_SECONDS:
            return
        if passed > 10 * LOOK_SECONDS:  # this process itself was stopped meanwhile
            self._stopped, self._silent = {}, {}
        self._looked = now
        pids = [root, *guard.descendants(root)]
        if stopped := self._over(pids, now):
            who = ", ".join(map(describe, stopped))
            self.why = (
                f"{who} stood still for {self._stopped_limit:.0f} s: stopped from outside (SIGSTOP "
                "or a debugger; state T in /proc). All were told to save and end. "
                "launch.stall_timeout (and launch.collective_timeout) say how long that may last"
            )
            stop()
            guard.signal_these(pids, signal.SIGCONT)  # a stopped one could not save
        elif silent := self._silent_rank(pids, now):
            rank, pid = silent
            known = STATES.get(state(pid), f"state {state(pid).decode() or 'unknown'}")
            self.why = (
                f"rank {rank} (process {pid}) gave no sign of life for "
                f"{self._limit + MARGIN_SECONDS:.0f} s: {known}. Where its threads stand is at the "
                "end of its log. launch.stall_timeout says how long that may last"
            )
            guard.signal_these([pid], signal.SIGABRT)  # faulthandler writes the stacks
            deadline = now + STACKS_SECONDS
            while state(pid) not in (b"", b"Z") and time.monotonic() < deadline:
                time.sleep(0.05)
            stop()

    def _over(self, pids: list[int], now: float) -> list[int]:
        """The processes that have been stopped for too long."""
        stopped = [pid for pid in pids if state(pid) in STOPPED]
        self._stopped = {pid: self._stopped.get(pid, now) for pid in stopped}
        over = [pid for pid, since in self._stopped.items() if now - since > self._stopped_limit]
        return stopped if over else []

    def _silent_rank(self, pids: list[int], now: float) -> tuple[int, int] | None:
        for rank, file in read_ranks(self._logs, ".alive").items():
            if file.ended or file.pid not in pids:
                continue
            count, since = self._silent.get(rank, (-1, now))
            since = since if count == file.count else now
            self._silent[rank] = file.count, since
            if now - since > self._limit + MARGIN_SECONDS:
                return rank, file.pid
        return None


def state(pid: int) -> bytes:
    """The letter of /proc/PID/stat (man 5 proc); empty where there is no such process."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as stream:
        return stream.read().rpartition(b")")[2].split()[0]
    return b""


def describe(pid: int) -> str:
    """Which rank, or which program, a process is."""
    variables, words = _read(pid, "environ"), _read(pid, "cmdline")
    rank = [entry.partition(b"=")[2].decode() for entry in variables if entry[:5] == b"RANK="]
    if rank and guard.is_rank(pid):
        return f"rank {rank[0]} (process {pid})"
    return f"process {pid} ({' '.join(os.path.basename(word.decode()) for word in words[:3])})"


def _read(pid: int, name: str) -> list[bytes]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/{name}", "rb") as stream:
        return stream.read().split(b"\0")
    return []
