"""Which ranks came to the end of a step, and where the others were: success is all of them."""

from __future__ import annotations

import time
from pathlib import Path

from launch.heartbeat import read_ranks

# Rank 0 may write its marker a moment after another node's launcher has ended; network file
# systems show a new file some seconds late.
PATIENCE_SECONDS = 10.0


def unfinished(logs: Path, world_size: int, wait: bool = False) -> list[str]:
    """The ranks without a completion marker, each with its host if known; none is success.

    `wait`: ranks were on several nodes, and a marker may be on its way.
    """
    deadline = time.monotonic() + (PATIENCE_SECONDS if wait else 0.0)
    while True:
        done = read_ranks(logs, ".done.json")
        absent = [rank for rank in range(world_size) if rank not in done]
        failed = any(logs.glob("rank*.failure.json"))
        if not absent or failed or time.monotonic() >= deadline:
            break
        time.sleep(0.2)
    known = read_ranks(logs, ".alive")
    return [f"rank {rank}{f' on {known[rank].host}' if rank in known else ''}" for rank in absent]
