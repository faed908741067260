"""Two sides measured in turn: the median of their ratios, its spread, one line of JSON.

The sides alternate, and which goes first alternates too, so that a machine that is busy for a
while slows both. Each pair gives two ratios: by the clock on the wall, and by CPU time, which a
busy machine distorts less. A side may run in a process of its own (`Worker`).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from launch.environment import memory_environment


def as_launched() -> None:
    """Starts this program again as the driver starts its ranks on a CPU, as to memory; other
    sides of a comparison inherit it. Does nothing where the user has set glibc's allocator up."""
    added = memory_environment(os.environ)
    if added:
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, os.environ | added)


@dataclass(frozen=True)
class Measurement:
    """One run of one side: `work` in any unit that both sides share (tokens, samples, steps)."""

    work: float
    seconds: float
    cpu_seconds: float


Side = Callable[[], float] | Callable[[], Measurement]


def measure(side: Side) -> Measurement:
    """Runs a side once. A side returns its work, or a whole Measurement if it ran elsewhere."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = side()
    if isinstance(result, Measurement):
        return result
    return Measurement(result, time.perf_counter() - wall, time.process_time() - cpu)


def compare(ours: Side, theirs: Side, *, pairs: int = 5, warmup: int = 1) -> dict[str, Any]:
    """Warms both sides up, then measures `pairs` pairs in turn.

    Returns, ready for `print_line`: `median_ratio` (our work per second over theirs) and `spread`
    [least, largest] by the wall clock; the same by CPU time; each side's median work per second
    (`ours`, `theirs`, by wall clock and CPU time); and `pairs`.
    """
    if pairs < 1:
        raise SystemExit(f"--pairs {pairs}: at least 1, and 5 or more for a figure to quote")
    for _ in range(warmup):
        ours(), theirs()
    left: list[Measurement] = []
    right: list[Measurement] = []
    for turn in range(pairs):
        for mine in (True, False) if turn % 2 == 0 else (False, True):
            (left if mine else right).append(measure(ours if mine else theirs))
    wall = [_rate(a) / _rate(b) for a, b in zip(left, right, strict=True)]
    cpu = [_cpu_rate(a) / _cpu_rate(b) for a, b in zip(left, right, strict=True)]
    return {
        "pairs": pairs,
        "median_ratio": _round(statistics.median(wall)),
        "spread": [_round(min(wall)), _round(max(wall))],
        "cpu_median_ratio": _round(statistics.median(cpu)),
        "cpu_spread": [_round(min(cpu)), _round(max(cpu))],
        "ours": summary(left),
        "theirs": summary(right),
    }


def summary(runs: Sequence[Measurement]) -> dict[str, float]:
    """Medians of several runs of one side: work per second, by wall clock and by CPU time."""
    return {
        "per_second": _round(statistics.median(map(_rate, runs))),
        "per_cpu_second": _round(statistics.median(map(_cpu_rate, runs))),
        "seconds": _round(statistics.median(run.seconds for run in runs)),
    }


def print_line(benchmark: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """One line of JSON: what was measured, with what settings, where and when."""
    line = {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "settings": dict(settings),
        **result,
    }
    print(json.dumps(line), flush=True)


def machine() -> str:
    """Processor and number of cores, e.g. "AMD EPYC, 2 cores"."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [ln for ln in cpuinfo.read_text().splitlines() if ln.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {os.cpu_count()} cores"


class Worker:
    """A side in another process, perhaps of another environment; use `worker(...)`.

    The process calls `serve(run)` after its preparations. It shares no Python state with this one.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self._input: IO[str] = process.stdin
        self._output: IO[str] = process.stdout

    def __call__(self) -> Measurement:
        """One run."""
        try:
            self._input.write("run\n")
            self._input.flush()
        except BrokenPipeError:
            self._ended()
        for line in self._output:
            if line.startswith(_MARK):
                return Measurement(**json.loads(line[len(_MARK) :]))
        return self._ended()

    def _ended(self) -> Measurement:
        raise SystemExit(
            f"the other side's process ended with code {self._process.wait()}: see its output above"
        )


@contextmanager
def worker(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """Starts `argv` with `env` added to ours; ends it on leaving. Its stderr is ours."""
    process = subprocess.Popen(
        list(argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    try:
        yield Worker(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


_MARK = "measured "


def serve(run: Callable[[], float]) -> None:
    """In the worker process: measures `run` once for each line on stdin, until it closes.

    Whatever else `run` prints is harmless: only marked lines are read.
    """
    for _ in sys.stdin:
        print("\n" + _MARK + json.dumps(asdict(measure(run))), flush=True)


def _rate(run: Measurement) -> float:
    return run.work / run.seconds


def _cpu_rate(run: Measurement) -> float:
    return run.work / max(run.cpu_seconds, 1e-9)


def _round(value: float) -> float:
    return float(f"{value:.4g}")
