"""The `accelerate` launcher's command line: it starts processes; DeepSpeed is the steps' own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from launch.spec import Placement, check_even
from rlhf.errors import ConfigError, RequirementError

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
# What a step's processes can be started as. The others wrap the model in something else.
TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED")


def command(script: Path, args: Sequence[str], placement: Placement) -> list[str]:
    """`accelerate launch ...`, of one node if there are several. Raises ConfigError.

    Flags go before the config file, so processes, nodes and addresses are those of this run.
    `--multi_gpu` is how accelerate itself starts several processes on each node, by torchrun, on
    CPUs too: `--cpu` starts one, and its DeepSpeed launcher copies the whole environment, tokens
    too, to a file and to the other nodes.
    """
    check_even(placement, "accelerate")
    config = placement.config.accelerate_config
    options = [f"--config_file={config}"] if config else []
    if config:
        check_config(Path(config))
    options += [
        f"--num_processes={placement.world_size}",
        f"--num_machines={len(placement.hosts)}",
        "--dynamo_backend=no",
        "--mixed_precision=no",  # the engine's dtype decides
    ]
    if placement.world_size > 1:
        options.append("--multi_gpu")
    if placement.multi_node:
        rank = "{node}" if placement.node_rank is None else placement.node_rank
        options += [f"--machine_rank={rank}", f"--main_process_ip={placement.master}"]
        options.append("--rdzv_backend=static")
    else:
        options += ["--machine_rank=0", "--main_process_ip=127.0.0.1"]
        if placement.accelerator == "cuda":
            devices = next(iter(placement.hosts.values()))
            options.append(f"--gpu_ids={','.join(map(str, devices))}")
    options.append(f"--main_process_port={placement.master_port}")
    options += shlex.split(placement.config.launcher_args or "")
    return [*LAUNCH, *options, str(script), *args]


def check_config(path: Path) -> None:
    """Raises RequirementError or ConfigError for a file that cannot start the steps."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequirementError(
            f"--accelerate-config {path}: cannot be read ({error}). `accelerate config` makes one"
        ) from error
    kind = str(content.get("distributed_type", "NO")) if isinstance(content, dict) else "nothing"
    if kind not in TYPES:
        raise ConfigError(
            f"--accelerate-config {path}: distributed_type {kind}: the steps run on DeepSpeed; "
            f"use a file with one of {', '.join(TYPES)}, and --actor-zero-stage to shard"
        )
