"""The `deepspeed` launcher's command line: on this machine, over pdsh, mpirun or srun, by hand."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.hosts import filter_text, read_hostfile
from launch.spec import Placement
from rlhf.errors import ConfigError

# deepspeed reads this file unasked; a cluster image may have one (launcher/runner.py).
DEFAULT_HOSTFILE = Path("/job/hostfile")


def command(script: Path, args: Sequence[str], placement: Placement) -> list[str]:
    """`python -m deepspeed.launcher.runner ...`; its own log shows errors only.

    Raises ConfigError for what openmpi and srun cannot express.
    """
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
    if not placement.hostfile:
        raise ConfigError(
            "launcher deepspeed on several nodes reads its hosts from a file: give --hostfile "
            "(lines of `host slots=N`), or use --launcher torchrun or slurm with --num-nodes"
        )
    options = [f"--hostfile={placement.hostfile}"]
    backend = placement.config.node_launcher
    if placement.by_hand:
        backend = "pdsh"  # none is used
    if backend == "openmpi":
        return [*options, *_openmpi(placement)]
    # An include filter says exactly what was resolved, whichever flags it came from.
    options.append(f"--include={filter_text(placement.hosts)}")
    if placement.master_addr:
        options.append(f"--master_addr={placement.master_addr}")
    if placement.by_hand:
        return [*options, "--no_ssh", f"--node_rank={placement.node_rank}"]
    if len(placement.hosts) == 1:
        options.append("--force_multi")
    extra = placement.config.launcher_args or ""
    if backend == "slurm":
        if len({len(devices) for devices in placement.hosts.values()}) > 1:
            raise ConfigError(
                "node_launcher slurm starts the same number of processes on every node: use "
                "--num-gpus, or --node-launcher pdsh"
            )
        # Its own default lets the others wait when one task dies.
        extra = f"--kill-on-bad-exit=1 {extra}".strip()
        options += ["--launcher=slurm", "--no_ssh_check"]
    if extra:
        options.append(f"--launcher_args={extra}")
    return options


def _openmpi(placement: Placement) -> list[str]:
    slots = read_hostfile(placement.hostfile or "")
    if placement.hosts != {host: list(range(count)) for host, count in slots.items()}:
        raise ConfigError(
            "node_launcher openmpi uses every slot of the hostfile: filters, --num-nodes and "
            "--num-gpus cannot be given with it; write a hostfile of what is to be used, or use "
            "--node-launcher pdsh"
        )
    words = ["--bind-to", "none", *shlex.split(placement.config.launcher_args or "")]
    for name in placement.exported:  # by name: no value appears on a command line
        words += ["-x", name]
    master = [f"--master_addr={placement.master}"]
    return [*master, "--launcher=openmpi", f"--launcher_args={shlex.join(words)}"]
