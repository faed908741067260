"""The variables that every process of a step gets. Secrets are inherited, never listed here."""

from __future__ import annotations

import os
from collections.abc import Mapping

from launch.devices import cpu_cores
from launch.fanout import SSH_OPTIONS
from launch.spec import PROJECT_ROOT, Placement
from rlhf.config.names import DEFAULT_ENDPOINT
from rlhf.config.schema import RunConfig

# Large buffers come and go at every layer. By default glibc gives each back to the kernel, which
# clears it anew (4 KiB at a time) for the next one: docs/performance.md has the figures.
KEEP_MEMORY = (
    "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=4294967296:"
    "glibc.malloc.mmap_threshold=4294967296"
)
HUB_VARIABLES = ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HUB_OFFLINE")


def child_environment(
    config: RunConfig, placement: Placement, environ: Mapping[str, str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """(variables to set, variables to remove) for a step's launcher and all its processes."""
    environ = os.environ if environ is None else environ
    paths = [str(PROJECT_ROOT), environ.get("PYTHONPATH", "")]
    env = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    unset: list[str] = []
    if placement.accelerator == "cpu":
        env["DS_ACCELERATOR"] = "cpu"  # else deepspeed warns in every process that it found no GPU
        env["OMP_NUM_THREADS"] = str(threads(config, placement, environ))
        if config.launch.keep_memory is True:  # `auto` has been decided: launch/memory.py
            env |= memory_environment(environ)
    elif config.launch.threads is not None:
        env["OMP_NUM_THREADS"] = str(config.launch.threads)
    env["RLHF_COLLECTIVE_TIMEOUT"] = str(config.launch.collective_timeout)
    if placement.multi_node:
        env.update(_nodes(placement))
    _devices(config, placement, env, unset, environ)
    hub_env, hub_unset = hub_environment(config, environ)
    return {**env, **hub_env}, [*unset, *hub_unset]


def memory_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """For processes on a CPU; nothing where the user has set glibc's allocator up."""
    chosen = any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in environ)
    return {} if chosen else {"GLIBC_TUNABLES": KEEP_MEMORY}


def _nodes(placement: Placement) -> dict[str, str]:
    """What ssh and the schedulers need to be told."""
    env = {}
    launcher, backend = placement.config.launcher, placement.config.node_launcher
    if placement.over_ssh and launcher == "deepspeed":
        # A dead link is noticed after 15 s; without, ssh waits for as long as TCP does.
        env["PDSH_SSH_ARGS_APPEND"] = " ".join(SSH_OPTIONS)
    if launcher == "slurm":
        env["RLHF_RANKS_FROM"] = "slurm"
    elif launcher == "deepspeed" and backend != "pdsh" and not placement.by_hand:
        # mpirun and srun number the processes in their own way: rlhf/lifeline.py reads it.
        env["RLHF_RANKS_FROM"] = backend
        env["MASTER_ADDR"], env["MASTER_PORT"] = placement.master, str(placement.master_port)
    return env


def threads(config: RunConfig, placement: Placement, environ: Mapping[str, str]) -> int:
    """CPU threads per process: as set, else the environment's, else 1 or all cores."""
    if config.launch.threads is not None:
        return config.launch.threads
    if environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(environ["OMP_NUM_THREADS"])
    return 1 if placement.per_node > 1 else cpu_cores()


def hub_environment(
    config: RunConfig, environ: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The hub's variables: huggingface_hub and datasets read them when they are imported."""
    env: dict[str, str] = {}
    unset: list[str] = []
    endpoint = config.hub.endpoint
    if endpoint:
        env["HF_ENDPOINT"] = endpoint
        if endpoint != DEFAULT_ENDPOINT and "HF_HUB_DISABLE_XET" not in environ:
            env["HF_HUB_DISABLE_XET"] = "1"  # xet fetches from elsewhere, past the mirror
    elif "HF_ENDPOINT" in environ:
        unset.append("HF_ENDPOINT")  # an empty one breaks `datasets`
    if config.hub.offline:
        env["HF_HUB_OFFLINE"] = "1"
    return env, unset


def _devices(
    config: RunConfig,
    placement: Placement,
    env: dict[str, str],
    unset: list[str],
    environ: Mapping[str, str],
) -> None:
    if placement.multi_node or placement.accelerator == "cpu":
        return
    numbers = next(iter(placement.hosts.values()))
    if config.launch.launcher == "torchrun":
        if not placement.any_devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, numbers))
    elif environ.get("CUDA_VISIBLE_DEVICES"):
        unset.append("CUDA_VISIBLE_DEVICES")  # its devices are in the launcher's --include
