"""The `torchrun` launcher's command line: static on one machine, c10d rendezvous on several."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.spec import Placement, check_even

RUN = [sys.executable, "-m", "torch.distributed.run"]


def command(script: Path, args: Sequence[str], placement: Placement) -> list[str]:
    """`python -m torch.distributed.run ...`, of one node if there are several.

    With c10d the first node's address and port are the meeting point, and ranks go to nodes in the
    order of their arrival; the port of the process group is chosen there.
    Raises ConfigError for nodes with different numbers of processes.
    """
    check_even(placement, "torchrun")
    options = [f"--nnodes={len(placement.hosts)}", f"--nproc-per-node={placement.per_node}"]
    if placement.multi_node:
        options += [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={placement.master}:{placement.master_port}",
            f"--rdzv-id=rlhf-{placement.master_port}",
        ]
    else:
        options += ["--master-addr=127.0.0.1", f"--master-port={placement.master_port}"]
    options += shlex.split(placement.config.launcher_args or "")
    return [*RUN, *options, str(script), *args]
