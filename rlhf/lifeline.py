"""What ties a rank to its driver, on any host: numbers, signs of life, a completion marker.

In a step's logs directory, which all hosts share:

    driver.beat       the driver counts in it while it lives; "stop": save and end; "ended": it is
                      done, end at once
    rankK.alive       rank K counts in it while it lives (JSON: host, pid, count, ended)
    rankK.done.json   rank K has come to the end of the step

A killed driver, pdsh or deepspeed leaves the ranks on other hosts running: nothing tells them. So
each rank reads the driver's count in a thread, and ends when it says so or stands still.

On the driver's own machine a rank watches the guard (launch/guard.py), whose children all of them
are: when it is gone, killed too, the rank saves and ends by itself. Its signs of life are there for
the driver, which looks for ranks that stand still (launch/standstill.py).
Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

BEAT_FILE, ENDED, STOP = "driver.beat", "ended", "stop"
INTERVAL_SECONDS = 1.0
HEARTBEAT, FORWARDED = "RLHF_HEARTBEAT", "RLHF_FORWARDED"
EXIT_WITHOUT_DRIVER = 143  # as if it had been told to terminate
GUARD = "RLHF_GUARD"  # "pid start-time boot", as launch/guard.py writes it
GRACE = "RLHF_GRACE"  # seconds that a rank has to save when its guard is gone
# scheduler -> our variable -> its variable
SCHEDULERS = {
    "openmpi": {
        "RANK": "OMPI_COMM_WORLD_RANK",
        "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    },
    "slurm": {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"},
}


def adopt_environment(environ: MutableMapping[str, str]) -> None:
    """Rank and world size from mpirun or srun, and the variables that were forwarded by file.

    Only where the driver has said so (RLHF_RANKS_FROM): a shell inside an allocation has Slurm's
    variables too, and is no rank.
    """
    names = SCHEDULERS.get(environ.get("RLHF_RANKS_FROM", ""), {})
    if "RANK" not in environ and all(theirs in environ for theirs in names.values()):
        environ.update({ours: environ[theirs] for ours, theirs in names.items()})
    if path := environ.get(FORWARDED):
        environ.update(json.loads(Path(path).read_text(encoding="utf-8")))


class Lifeline:
    """A rank's signs of life, and its watch over the driver's. `start` once, `end` once."""

    def __init__(self, logs: Path, rank: int, environ: MutableMapping[str, str]) -> None:
        self.beat = logs / BEAT_FILE
        self.alive = logs / f"rank{rank}.alive"
        self.done = logs / f"rank{rank}.done.json"
        self.failure = logs / f"rank{rank}.failure.json"
        self.rank = rank
        self.timeout = float(environ.get(HEARTBEAT, "0"))
        self.guard = environ.get(GUARD, "")
        self.grace = float(environ.get(GRACE, "15"))
        self._guarded = bool(boot()) and self.guard.endswith(boot())
        self._ending = threading.Event()
        self._checked = time.monotonic()
        self._count = 0

    def start(self) -> None:
        """Removes an earlier marker; watches the driver if it says that it can be watched."""
        self.done.unlink(missing_ok=True)
        if self._guarded:
            self._sign()
            threading.Thread(target=self._watch_guard, daemon=True, name="lifeline-guard").start()
        if self.timeout > 0:
            self._sign()
            # Two threads: reading from a lost network file system may never return.
            threading.Thread(target=self._watch, daemon=True, name="lifeline").start()
            threading.Thread(target=self._judge, daemon=True, name="lifeline-timer").start()

    def end(self, finished: bool) -> None:
        """The last thing a rank does. `finished`: it came to the step's end without an error."""
        self._ending.set()
        if finished:
            write(self.done, {"rank": self.rank, "host": socket.gethostname(), "time": time.time()})
        if self.timeout > 0 or self._guarded:
            self._sign(ended=True)

    def _sign(self, ended: bool = False) -> None:
        self._count += 1
        who = {"host": socket.gethostname(), "pid": os.getpid()}
        with contextlib.suppress(OSError):
            state = {"rank": self.rank, **who, "count": self._count, "ended": ended}
            try:
                write(self.alive, state)
            except OSError:  # a full disk: the file's time is a sign of life too
                os.utime(self.alive)

    def _watch(self) -> None:
        last, seen = "", 0
        while not self._ending.wait(INTERVAL_SECONDS):
            self._sign()
            with contextlib.suppress(OSError):
                found = self.beat.read_text(encoding="utf-8")
                if found == ENDED:
                    self._leave("the driver has ended this step")
                if found.startswith(STOP) and not last.startswith(STOP):
                    os.kill(os.getpid(), signal.SIGTERM)  # as where the launcher passes it on
                at = self.beat.stat().st_mtime_ns  # all that changes while the disk is full
                if (found, at) != (last, seen):
                    last, seen, self._checked = found, at, time.monotonic()

    def _watch_guard(self) -> None:
        while is_alive(self.guard):
            if self._ending.wait(INTERVAL_SECONDS):
                return
            if self.timeout == 0:  # else the other thread does
                self._sign()
        os.kill(os.getpid(), signal.SIGTERM)  # the training loop saves; elsewhere this ends it
        if not self._ending.wait(self.grace):
            self._leave(f"its guard (process {self.guard.split()[0]}) is gone")

    def _judge(self) -> None:
        while not self._ending.wait(INTERVAL_SECONDS):
            if time.monotonic() - self._checked > self.timeout:
                self._leave(
                    f"no sign of life of the driver for {self.timeout:g} s ({self.beat})",
                    "the driver was stopped (Ctrl-Z, SIGSTOP), its machine suspended, or the file "
                    "system that holds the run did not answer; the same command goes on from the "
                    "last checkpoint. launch.heartbeat_timeout says how long ranks wait",
                )

    def _leave(self, why: str, remedy: str = "") -> None:
        if self._ending.is_set():
            return
        with contextlib.suppress(Exception):
            print(f"rank {self.rank}: {why}: it ends too", file=sys.stderr, flush=True)
        if remedy:
            record = {"rank": self.rank, "host": socket.gethostname(), "time": time.time()}
            record |= {"phase": "", "type": "LostDriver", "message": f"{why}: the rank ended too"}
            record |= {"remedy": remedy, "traceback": "", "exit_code": 1}
            with contextlib.suppress(OSError):
                write(self.failure, record)
        self._sign(ended=True)
        os._exit(EXIT_WITHOUT_DRIVER)


def boot() -> str:
    """What this machine was given when it started; empty where it cannot be known."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def is_alive(identity: str) -> bool:
    """Does the process of this machine still run that `identity` ("pid start-time boot") names?"""
    pid, start, _ = identity.split()
    try:
        # "pid (name) state ...": the name may hold spaces and brackets
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return False
    return fields[0] != b"Z" and fields[19].decode() == start


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON by rename: a reader on another host sees the old or the new, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)
