"""What the parts of a GPU day share: a file of findings, timing, the plan, a profile."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Found:
    """What a part has found so far; written each time something is added."""

    path: Path
    small: bool
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, **values: Any) -> None:
        self.values |= values
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.values, indent=1))
        part.replace(self.path)

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """An exception inside is a finding under `name`, and does not end the part."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the day goes on, and says what failed
            text = f"{type(error).__name__}: {error}"
            print(f"{name}: {text}", file=sys.stderr, flush=True)
            self.add(**{name: {"failed": text[-1500:]}})


def timed(found: Found, turn: Callable[[], float], unit: str, runs: int) -> None:
    """Work per second after one warm-up, and the GPU's peak memory."""
    import torch

    on_gpu = torch.cuda.is_available()

    def once() -> tuple[float, float]:
        began = time.perf_counter()
        work = turn()
        if on_gpu:
            torch.cuda.synchronize()
        return work, time.perf_counter() - began

    _, first = once()
    found.add(unit=unit, first_seconds=first)
    seconds: list[float] = []
    for _ in range(runs):
        work, took = once()
        seconds.append(took)
        found.add(seconds=seconds, per_second=work / statistics.median(seconds))
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        found.add(
            peak_allocated=torch.cuda.max_memory_allocated(),
            peak_reserved=torch.cuda.max_memory_reserved(),
            beside_the_allocator=total - free - torch.cuda.memory_reserved(),
        )


def planned(settings: Any, policy: str, reward: str) -> dict[str, float | str]:
    """The planner's peak of these PPO settings on one GPU, without CUDA's own share."""
    from rlhf.config.schema import RunConfig
    from rlhf.plan.memory import GPU_FRAMEWORK, step_memory
    from rlhf.plan.read import read_shape
    from rlhf.plan.roles import Ranks, Shapes

    config = RunConfig(step3=settings)
    plan = step_memory(
        config, 3, Shapes(read_shape(policy), read_shape(reward)), Ranks(1, False, 1)
    )
    return {"peak": plan.peak - GPU_FRAMEWORK, "at": plan.worst}


def profiled(iteration: Callable[..., Any]) -> dict[str, Any]:
    """Of one iteration: the clock and the kernels' seconds in each phase, and which took most."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    phases: dict[str, dict[str, float]] = {}
    most: dict[str, list[float]] = {}

    @contextmanager
    def around(name: str) -> Iterator[None]:
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            yield
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        # The raw records: torch's own tables take minutes over so many.
        count, total = 0, 0.0
        for event in trace.profiler.kineto_results.events():
            if event.device_type() != torch.autograd.DeviceType.CUDA:
                continue
            took = event.duration_ns() / 1e9
            count, total = count + 1, total + took
            kept = most.setdefault(event.name()[:90], [0, 0.0])
            kept[0], kept[1] = kept[0] + 1, kept[1] + took
        phases[name] = {"clock": seconds, "kernels": total, "launches": count}

    if torch.cuda.is_available():
        iteration(around)
    ranked = sorted(most.items(), key=lambda item: -item[1][1])[:12]
    return {"phases": phases, "most": [[name, *figures] for name, figures in ranked]}


def inside(context: Any, act: Callable[[], Any]) -> None:
    with context:
        act()


def median_seconds(act: Callable[[], Any], runs: int = 5) -> float:
    """Median of several runs after one, each waited for."""
    import torch

    found = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])
