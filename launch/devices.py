"""Which devices there are and where a step's processes go. Asks the system, not torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping

from launch.hosts import apply_filters, read_hostfile
from launch.ports import choose_port
from launch.spec import Placement
from rlhf.config.schema import LaunchConfig
from rlhf.errors import ConfigError, RequirementError

LOCAL = "localhost"


def visible_gpus(environ: Mapping[str, str] | None = None) -> list[str]:
    """Names of the NVIDIA devices to use, as in CUDA_VISIBLE_DEVICES: numbers or UUIDs."""
    environ = os.environ if environ is None else environ
    if environ.get("DS_ACCELERATOR", "").lower() == "cpu":
        return []
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and chosen.strip() in ("", "-1"):
        return []
    count = _installed_gpus()
    if chosen is None or not count:
        return [str(number) for number in range(count)]
    names = [name.strip() for name in chosen.split(",")]
    # As CUDA does: what follows the first number that does not exist is invisible.
    for position, name in enumerate(names):
        if name.lstrip("-").isdigit() and not 0 <= int(name) < count:
            return names[:position]
    return names


def _installed_gpus() -> int:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def cpu_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def place(config: LaunchConfig, environ: Mapping[str, str] | None = None) -> Placement:
    """Where the processes run. Raises ConfigError or RequirementError."""
    if config.deployment_type == "multi_node":
        return _place_nodes(config)
    names = [] if config.accelerator == "cpu" else visible_gpus(environ)
    if config.accelerator == "cuda" and not names:
        raise RequirementError(
            "--accelerator cuda: no GPU is visible here (nvidia-smi lists none, or "
            "CUDA_VISIBLE_DEVICES or DS_ACCELERATOR hide them): leave the flag out for the CPU"
        )
    accelerator = "cuda" if names else "cpu"
    if config.deployment_type == "single_gpu":
        wanted: int | None = 1
    elif names:
        wanted = config.num_gpus
    else:
        wanted = config.num_gpus or 1
    if names and not all(name.isdigit() for name in names):
        return _by_count(config, names, wanted)
    devices = [int(name) for name in names] or list(range(wanted or 1))
    filtered = apply_filters({LOCAL: devices}, config.include, config.exclude)[LOCAL]
    if wanted is not None and names:
        filtered = _first(filtered, wanted)
    return Placement(
        accelerator=accelerator,
        hosts={LOCAL: filtered},
        master_addr="127.0.0.1",
        master_port=choose_port(config.master_port),
        any_devices=filtered == list(range(len(filtered))),
        config=config,
    )


def _by_count(config: LaunchConfig, names: list[str], wanted: int | None) -> Placement:
    """Devices named by UUID: torchrun leaves the variable alone, deepspeed needs numbers."""
    if config.launcher == "deepspeed" or config.include or config.exclude:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={','.join(names)}: the deepspeed launcher and the filters need "
            "device numbers: set numbers, or use --launcher torchrun without filters"
        )
    chosen = _first(list(range(len(names))), wanted or len(names))
    port = choose_port(config.master_port)
    return Placement("cuda", {LOCAL: chosen}, "127.0.0.1", port, config=config)


def _first(devices: list[int], wanted: int) -> list[int]:
    if wanted > len(devices):
        raise RequirementError(
            f"--num-gpus {wanted}: only {len(devices)} GPU(s) are visible here "
            f"({', '.join(map(str, devices))}): use --num-gpus {len(devices)}, or check "
            "CUDA_VISIBLE_DEVICES and the filters"
        )
    return devices[:wanted]


def _place_nodes(config: LaunchConfig) -> Placement:
    if config.hostfile:
        slots = read_hostfile(config.hostfile)
        hosts = {host: list(range(count)) for host, count in slots.items()}
        hosts = apply_filters(hosts, config.include, config.exclude)
    elif config.num_nodes and (config.launcher == "slurm" or _by_hand(config)):
        if chosen := config.include or config.exclude:
            raise ConfigError(
                f"filter {chosen!r}: there is no hostfile to choose from: give --hostfile, or for "
                "Slurm --launcher-args=--nodelist=..."
            )
        count = config.num_gpus or len(visible_gpus()) or 1
        hosts = {f"node{rank}": list(range(count)) for rank in range(config.num_nodes)}
    else:
        raise ConfigError(
            "deployment_type multi_node: give --hostfile (lines of `host slots=N`); or --num-nodes "
            "with --launcher slurm; or, for nodes that are started by hand, --launcher torchrun "
            "or accelerate with --num-nodes, --node-rank and --master-addr"
        )
    if config.num_nodes is not None:
        if config.num_nodes > len(hosts):
            raise ConfigError(
                f"--num-nodes {config.num_nodes}: the hostfile and filters leave {len(hosts)} "
                f"host(s) ({', '.join(hosts)}): add hosts, or use --num-nodes {len(hosts)}"
            )
        hosts = dict(list(hosts.items())[: config.num_nodes])
    if config.num_gpus is not None and config.hostfile:
        hosts = {host: _slots(host, free, config.num_gpus) for host, free in hosts.items()}
    rank = config.node_rank
    if rank is not None and rank >= len(hosts):
        raise ConfigError(
            f"--node-rank {rank}: the ranks of {len(hosts)} nodes end at {len(hosts) - 1}"
        )
    if rank is not None and not config.master_addr:
        raise ConfigError("--node-rank: nodes started by hand need --master-addr, the first node's")
    # All nodes must name one port, so a free one cannot be chosen on each of them.
    port = 29500 if config.master_port == "auto" else config.master_port
    found = "cuda" if visible_gpus() else "cpu"
    return Placement(
        accelerator=found if config.accelerator == "auto" else config.accelerator,
        hosts=hosts,
        master_addr=config.master_addr,
        master_port=choose_port(port) if rank == 0 else port,
        hostfile=config.hostfile,
        node_rank=rank,
        multi_node=True,
        config=config,
    )


def _by_hand(config: LaunchConfig) -> bool:
    return config.launcher in ("torchrun", "accelerate") and config.node_rank is not None


def _slots(host: str, devices: list[int], wanted: int) -> list[int]:
    if wanted > len(devices):
        raise ConfigError(
            f"--num-gpus {wanted}: host {host!r} has {len(devices)} slots: use fewer, or raise "
            "its slots in the hostfile"
        )
    return devices[:wanted]
