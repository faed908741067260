"""The `torchrun` launcher's command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.spec import Placement
from rlhf.errors import ConfigError


def command(script: Path, args: Sequence[str], placement: Placement) -> list[str]:
    """`python -m torch.distributed.run ...`. Raises ConfigError: what it cannot express."""
    counts = {len(devices) for devices in placement.hosts.values()}
    if len(counts) > 1:
        raise ConfigError(
            f"launcher torchrun starts the same number of processes on every node, the hostfile "
            f"gives {sorted(counts)}: use --num-gpus, or --launcher deepspeed"
        )
    address, rank = placement.master_addr or "127.0.0.1", placement.node_rank or 0
    if placement.multi_node and (placement.node_rank is None or not placement.master_addr):
        raise ConfigError(
            "launcher torchrun is started on each node by hand: give --node-rank and "
            "--master-addr (the first node's address), or use --launcher deepspeed with a hostfile"
        )
    options = [
        f"--nnodes={len(placement.hosts)}",
        f"--node-rank={rank}",
        f"--nproc-per-node={placement.per_node}",
        f"--master-addr={address}",
        f"--master-port={placement.master_port}",
    ]
    return [sys.executable, "-m", "torch.distributed.run", *options, str(script), *args]
