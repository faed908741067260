"""The launchers by name (`--launcher`), and the one LaunchSpec that each of them fills."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch import accelerate, deepspeed, fanout, slurm, torchrun
from launch.environment import child_environment
from launch.forward import (
    check_forward,
    deepspeed_may_see,
    env_file,
    forwarded,
    is_allowed,
)
from launch.spec import Launcher, LaunchSpec, NodesSpec, Placement
from rlhf.config.schema import RunConfig

LAUNCHERS: dict[str, Launcher] = {
    "deepspeed": deepspeed.command,
    "torchrun": torchrun.command,
    "accelerate": accelerate.command,
    "slurm": slurm.command,
}
# These know no way to other nodes: their command is started on each by ssh.
_ONE_NODE_EACH = ("torchrun", "accelerate")


def build_spec(
    config: RunConfig,
    script: Path,
    args: Sequence[str],
    placement: Placement,
    environ: Mapping[str, str] | None = None,
) -> LaunchSpec:
    """The command that starts `script args...` in every place. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    launcher = LAUNCHERS[config.launch.launcher]
    env, unset = child_environment(config, placement, environ)
    if not placement.multi_node:
        return LaunchSpec(launcher(script, args, placement), env, os.getcwd(), unset)
    if not placement.by_hand:  # there, each node's own shell has them
        check_forward(config.launch.forward, environ)
    inherited = {name: value for name, value in environ.items() if name not in unset}
    variables = forwarded(inherited, env)
    placement = replace(placement, exported=tuple(variables))
    argv = launcher(script, args, placement)
    nodes = NodesSpec(
        hosts=list(placement.hosts),
        forward=list(config.launch.forward),
        over_ssh=placement.over_ssh,
        by_hand=placement.by_hand,
        node_rank=placement.node_rank or 0,
        heartbeat_seconds=config.launch.heartbeat_timeout,
    )
    kind = (config.launch.launcher, config.launch.node_launcher)
    if placement.by_hand:
        pass  # every node has its own shell's environment
    elif kind == ("deepspeed", "pdsh"):
        nodes = replace(nodes, env_file=env_file(variables), clean=deepspeed_may_see)
    elif kind == ("deepspeed", "openmpi"):
        nodes = replace(nodes, clean=deepspeed_may_see)
    elif kind == ("deepspeed", "slurm"):
        nodes = replace(nodes, clean=_may_see(config.launch.forward))
    elif config.launch.launcher == "slurm":
        text = slurm.batch_script(script, args, placement, variables, os.getcwd())
        nodes = replace(nodes, files={str(slurm.job_file(args)): text})
    elif config.launch.launcher in _ONE_NODE_EACH:
        settings = [f"{name}={value}" for name, value in variables.items()]
        remote = ["env", f"--chdir={os.getcwd()}", *settings, *argv]
        argv = [sys.executable, fanout.__file__, ",".join(placement.hosts), *remote]
    return LaunchSpec(argv, env, os.getcwd(), unset, nodes)


def _may_see(forward: Sequence[str]) -> Callable[[str], bool]:
    """srun passes its whole environment on: it sees what may be passed on, and what it needs."""

    def allowed(name: str) -> bool:
        own = name in ("HOME", "USER", "LOGNAME", "SHELL", "LANG", "TMPDIR", *forward)
        return own or is_allowed(name) or name.startswith("SLURM_")

    return allowed
