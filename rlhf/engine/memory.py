"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory() -> float:
    """Bytes: the GPU allocator's peak, or on CPU the process's largest resident set so far."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
