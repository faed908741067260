"""Ranks and collectives. Everything works in one process too."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from rlhf.engine.waiting import watch_collectives

DEFAULT_TIMEOUT = 1800


def init_distributed() -> tuple[int, int]:
    """Join the process group that the launcher described, or make one of size 1.

    Returns:
        (rank, world size).
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = os.environ.get("MASTER_PORT", "0")
    if not torch.cuda.is_available():
        # Its compile takes a minute, gloo is as good for a few ranks, and with ranks on several
        # hosts the op crashes (docs/decisions/0004-no-shm-comm.md).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        timeout = collective_timeout()
        bind_timeout()
        watch_collectives()
        deepspeed.init_distributed(timeout=timeout)
    return rank(), world_size()


def collective_timeout() -> datetime.timedelta:
    """`launch.collective_timeout`, as the driver or the harness has put it into the environment."""
    return datetime.timedelta(
        seconds=int(os.environ.get("RLHF_COLLECTIVE_TIMEOUT", DEFAULT_TIMEOUT))
    )


def bind_timeout() -> None:
    """Groups that DeepSpeed makes get the timeout too.

    DeepSpeed clones the group of all ranks for ZeRO's collectives with torch's `new_group(ranks)`,
    without a timeout: 30 minutes, whatever init_distributed or DEEPSPEED_TIMEOUT say.
    """
    from deepspeed.comm.torch import TorchBackend

    if getattr(TorchBackend.new_group, "bound_by_rlhf", False):
        return

    def new_group(self: Any, ranks: Any) -> Any:
        return dist.new_group(ranks, timeout=collective_timeout())

    new_group.bound_by_rlhf = True  # type: ignore[attr-defined]
    TorchBackend.new_group = new_group


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Reduce over all ranks, in place; `op` is "sum" or "max". Returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return tensor


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """(...) of each rank -> (world size, ...), on every rank; all pass the same shape and dtype."""
    if world_size() == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Sums each value over the ranks, in float64; all ranks pass the same keys."""
    keys = sorted(values)
    total = torch.tensor([float(values[key]) for key in keys], dtype=torch.float64)
    total = all_reduce(total.to(device()))
    return dict(zip(keys, total.tolist(), strict=True))


def gather_lists(items: list[Any]) -> list[Any]:
    """All ranks' lists of plain objects, joined in rank order, on every rank."""
    if world_size() == 1:
        return items
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def broadcast_object(item: Any) -> Any:
    """Rank 0's plain object, on every rank."""
    if world_size() == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box)
    return box[0]


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 runs the body, then each other node's first rank, then the rest of all ranks.

    Who comes later finds the result in a cache, be that shared by the nodes or each node's own. Two
    nodes never write at the same time what is shared.
    """
    turn = 0 if rank() == 0 else 1 if int(os.environ.get("LOCAL_RANK", "0")) == 0 else 2
    for _ in range(turn):
        barrier()
    try:
        yield
    finally:
        for _ in range(2 - turn):
            barrier()


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
