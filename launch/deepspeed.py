"""The `deepspeed` launcher's command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.hosts import filter_text
from launch.spec import Placement

# deepspeed reads this file unasked; a cluster image may have one (launcher/runner.py).
DEFAULT_HOSTFILE = Path("/job/hostfile")


def command(script: Path, args: Sequence[str], placement: Placement) -> list[str]:
    """`python -m deepspeed.launcher.runner ...`; its own log shows errors only."""
    options = ["--log_level=error"]
    options += _nodes(placement) if placement.multi_node else _here(placement)
    options.append(f"--master_port={placement.master_port}")
    runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*runner, *options, str(script), *args]


def _here(placement: Placement) -> list[str]:
    options = [f"--hostfile={os.devnull}"] if DEFAULT_HOSTFILE.exists() else []
    if placement.any_devices:
        return [*options, f"--num_gpus={placement.world_size}"]
    # --num_gpus would mean devices 0..N-1 and ignore CUDA_VISIBLE_DEVICES.
    return [*options, f"--include={filter_text(placement.hosts)}"]


def _nodes(placement: Placement) -> list[str]:
    options = [f"--hostfile={placement.hostfile}"]
    # An include filter says exactly what was resolved, whichever flags it came from.
    options.append(f"--include={filter_text(placement.hosts)}")
    if placement.master_addr:
        options.append(f"--master_addr={placement.master_addr}")
    if placement.node_rank is not None:
        options += ["--no_ssh", f"--node_rank={placement.node_rank}"]
    elif len(placement.hosts) == 1:
        options.append("--force_multi")
    return options
