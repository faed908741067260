"""How sharded weights (ZeRO-3) come together to generate: whole, or layer by layer.

Whole, they are gathered once for all answers, and ranks run on their own. Layer by layer ZeRO's own
hooks gather each module for its forward and let it go: no rank ever holds the whole policy, every
token sends all weights, and ranks call forward equally often (`lockstep`).
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.engine import comm
from rlhf.engine.memory import available_memory
from rlhf.engine.zero3 import full_size, is_sharded, kept_whole

# Beside the gathered weights a rollout repacks them (packing.py, blocks.py) and has its cache; on a
# GPU an allocation too much ends the run. RAM that is taken for files is counted as free, so there
# only a policy that is larger than all of it is sure not to fit.
ROOM_ON_GPU, ROOM_IN_RAM = 2.5, 1.0


@dataclass(frozen=True)
class Gathering:
    """What `build_rollout` needs to know."""

    module: Any
    whole: bool
    why: str = ""
    """For the log; empty where nothing is sharded."""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `build_rollout`."""
        return {"gather": self.ready, "lockstep": not self.whole}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model as generation needs it: with its own adapters, and gathered if it must be."""
        in_use: Callable[[], AbstractContextManager[None]]
        in_use = getattr(self.module, "in_use", nullcontext)
        kept = kept_whole(self.module.parameters()) if self.whole else nullcontext()
        with in_use(), kept:
            yield


def gathering(setting: str, engine: str, module: Any) -> Gathering:
    """What `rollout.gather` means for this model. Collective.

    Args:
        engine: name of the rollout engine; only `continuous` can go layer by layer.
        module: the role's module, sharded or not.
    """
    parameters = list(module.parameters())
    if not is_sharded(parameters):
        return Gathering(module, whole=True)
    size = sum(full_size(p) * p.element_size() for p in parameters)
    if engine != "continuous" or setting == "always":
        return Gathering(module, True, f"gathered whole ({_gb(size)})")
    if setting == "never":
        return Gathering(module, False, f"gathered layer by layer (of {_gb(size)})")
    return _as_it_fits(module, size)


def _as_it_fits(module: Any, size: float) -> Gathering:
    """The same on every rank: as the one with least room has it."""
    on_gpu = torch.cuda.is_available()
    # Ranks of a machine share its RAM, not its GPUs.
    found = comm.gather_lists([(socket.gethostname(), available_memory())])
    sharing = Counter(host for host, _ in found)
    shares = [free if on_gpu else free / sharing[host] for host, free in found if free is not None]
    least = min(shares, default=float("inf"))
    whole = size * (ROOM_ON_GPU if on_gpu else ROOM_IN_RAM) <= least
    how = "whole" if whole else "layer by layer"
    where = f"{_gb(least)} free for each rank" if shares else "free memory is not known"
    return Gathering(module, whole, f"gathered {how} ({_gb(size)}, {where}; step3.rollout.gather)")


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"
