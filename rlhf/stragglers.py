"""Which rank is slow: its own work by phase, compared with that of the others."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rlhf.config.running import LaunchConfig
from rlhf.engine import comm
from rlhf.engine.waiting import own_seconds
from rlhf.harness import StepRun
from rlhf.store.files import open_own

WINDOWS = 3  # so many in a row: one slow window is noise
WORTH = (
    0.1  # share of the run's time that it must cost: a phase of milliseconds is nobody's concern
)


def slow_ranks(times: Sequence[float], factor: float, least: float) -> dict[int, float]:
    """Rank -> how many times the median of the *other* ranks' seconds its own are.

    Only those of `factor` and more that are `least` seconds over it. The rank itself is left out of
    the median: with two ranks that would be the mean of both, which one of them can never double.
    """
    found = {}
    for rank, seconds in enumerate(times):
        others = statistics.median([*times[:rank], *times[rank + 1 :]])
        if seconds >= factor * others and seconds - others >= least:
            found[rank] = seconds / others if others > 0 else math.inf
    return found


class Stragglers:
    """Seconds of each rank's own work. All ranks make one and call its methods together.

    Everything by rank goes to `logs/ranks.jsonl`. A rank that is slow for
    `launch.straggler_seconds` is named on the console, once until it is as fast as the others.
    """

    def __init__(self, settings: LaunchConfig, logs: Path, say: Callable[[str], None]) -> None:
        self._factor, self._window = settings.straggler_factor, settings.straggler_seconds / WINDOWS
        self._say, self._file = say, logs / "ranks.jsonl"
        self._hosts = comm.gather_lists([socket.gethostname()])
        self._own: dict[str, float] = {}
        self._began = own_seconds()
        self._table: dict[str, list[float]] = {}  # phase -> seconds of each rank in this window
        self._opened = time.perf_counter()
        self._row: dict[tuple[int, str], int] = {}  # slow in so many windows in a row

    @classmethod
    def of(cls, run: StepRun) -> Stragglers:
        """Those of a step."""
        return cls(run.config.launch, run.directory.logs(run.resolved.step), run.say)

    def skip(self) -> None:
        """What was done since the last lap belongs to no phase."""
        self._began = own_seconds()

    def lap(self, phase: str) -> None:
        """What was done since the last lap was `phase`."""
        now = own_seconds()
        self._own[phase] = self._own.get(phase, 0.0) + now - self._began
        self._began = now

    def figures(self, position: int) -> dict[str, float]:
        """Of each phase since the last call: median and maximum over the ranks, and who that was.

        Collective, one all-gather of a number for each phase. {} with one rank.
        """
        own, self._own = self._own, {}
        if comm.world_size() == 1 or not own:
            return {}
        mine = torch.tensor([own[phase] for phase in sorted(own)], dtype=torch.float64)
        rows = comm.all_gather(mine.to(comm.device())).T.tolist()
        times = dict(zip(sorted(own), rows, strict=True))
        self._record(position, times)
        found: dict[str, float] = {}
        for phase, seconds in times.items():
            before = self._table.get(phase, [0.0] * len(seconds))
            self._table[phase] = [a + b for a, b in zip(before, seconds, strict=True)]
            found |= {
                f"ranks/seconds_{phase}_median": statistics.median(seconds),
                f"ranks/seconds_{phase}_max": max(seconds),
                f"ranks/seconds_{phase}_slowest_rank": seconds.index(max(seconds)),
            }
        self._judge()
        self.skip()
        return found

    def _record(self, position: int, times: dict[str, list[float]]) -> None:
        if comm.rank() != 0:
            return
        rounded = {phase: [round(one, 4) for one in row] for phase, row in times.items()}
        line = {"step": position, "time": round(time.time(), 3), "seconds": rounded}
        with contextlib.suppress(OSError), open_own(self._file, "ab") as stream:
            stream.write((json.dumps(line) + "\n").encode())

    def _judge(self) -> None:
        """Once in a window, if it is over."""
        passed = time.perf_counter() - self._opened
        if passed < self._window or not self._factor:
            return
        row = {}
        for phase, times in self._table.items():
            for rank, factor in slow_ranks(times, self._factor, WORTH * passed).items():
                row[rank, phase] = self._row.get((rank, phase), 0) + 1
                if row[rank, phase] == WINDOWS:
                    self._name(rank, phase, factor, times, passed)
        self._row, self._table, self._opened = row, {}, time.perf_counter()

    def _name(
        self, rank: int, phase: str, factor: float, times: Sequence[float], passed: float
    ) -> None:
        host = self._hosts[rank]
        others = statistics.median([*times[:rank], *times[rank + 1 :]])
        often = f"{factor:.1f}" if factor < 100 else "over 100"
        alone = len(set(self._hosts)) == 1
        leave = "" if alone else f", or leave it out (--exclude {host})"
        self._say(
            f"warning: rank {rank} on {host} is slow: its own work in the phase `{phase}` takes "
            f"{often} times as long as on the other ranks ({times[rank]:.1f} s against "
            f"{others:.1f} s in the last {passed:.0f} s), and all wait for it. Look for other "
            f"programs, heat or a failing disk on {host}{leave}. launch.straggler_factor decides "
            "what is slow"
        )
