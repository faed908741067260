"""How long this rank has waited in collective operations.

They hide who is slow: everybody waits until the slowest has come. What a rank does between them is
its own. torch's `Work.wait` is where all of them wait, DeepSpeed's too, with gloo. NCCL waits on
the device instead: there the host's seconds are all that is known.
"""

from __future__ import annotations

import time
from typing import Any

from torch._C._distributed_c10d import Work

_waited = 0.0


def watch_collectives() -> None:
    """From now on the seconds in `Work.wait` are counted; a second call changes nothing."""
    wait = Work.wait
    if getattr(wait, "counted_by_rlhf", False):
        return

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _waited
        began = time.perf_counter()
        try:
            return wait(self, *args, **kwargs)
        finally:
            _waited += time.perf_counter() - began

    counted.counted_by_rlhf = True  # type: ignore[attr-defined]
    Work.wait = counted  # type: ignore[method-assign]


def own_seconds() -> float:
    """A clock that stands still while this rank waits for others."""
    return time.perf_counter() - _waited
