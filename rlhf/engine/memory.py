"""Peak memory of this process, as a whole and by phase."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
_largest = 0.0


def peak_memory() -> float:
    """Bytes: the GPU allocator's peak, or on CPU the process's largest resident set, so far."""
    global _largest
    _largest = max(_largest, _peak())
    return _largest


def peak_since_last() -> float:
    """The peak since the last call, in bytes.

    Where the system cannot forget a peak (a CPU without Linux's /proc) it is the peak so far.
    """
    peak = _peak()
    peak_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc
    return peak


def available_memory() -> float | None:
    """Bytes that this process could still take: of its GPU, or of the RAM that all here share.

    None: the system does not say.
    """
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return float(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    found = []
    with suppress(OSError, IndexError, ValueError):  # not Linux
        words = MEMINFO.read_text(encoding="ascii").split("MemAvailable:")[1].split()
        found.append(float(words[0]) * 1024)
    with suppress(OSError, ValueError):  # no such files, or `max`: no limit
        limit = float((CGROUP / "memory.max").read_text(encoding="ascii"))
        found.append(limit - float((CGROUP / "memory.current").read_text(encoding="ascii")))
    return max(min(found), 0.0) if found else None


def _peak() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
