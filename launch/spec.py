"""What is started, and what a launcher is."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rlhf.config.schema import LaunchConfig
from rlhf.errors import ConfigError

PROJECT_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Placement:
    """Where the processes of a step run."""

    accelerator: str
    """`cuda` or `cpu`."""
    hosts: dict[str, list[int]]
    """Host -> the device numbers (on CPU: rank numbers) used on it; one entry for this machine."""
    master_addr: str | None
    master_port: int
    hostfile: str | None = None
    node_rank: int | None = None
    multi_node: bool = False
    any_devices: bool = True
    """The devices are simply the first ones, so that a count is enough to name them."""
    config: LaunchConfig = field(default_factory=LaunchConfig)
    """The settings behind it, for what only one launcher wants to know."""
    exported: tuple[str, ...] = ()
    """Names of the variables that every process on every node is to get."""

    @property
    def master(self) -> str:
        """The first node's address: as given, else its name in the hostfile."""
        return self.master_addr or next(iter(self.hosts))

    @property
    def by_hand(self) -> bool:
        """Is this command one of several, each started on its own node?"""
        return self.multi_node and self.node_rank is not None

    @property
    def over_ssh(self) -> bool:
        """Does this command reach the other nodes by ssh?"""
        uses_slurm = self.config.launcher == "slurm" or (
            self.config.launcher == "deepspeed" and self.config.node_launcher == "slurm"
        )
        return self.multi_node and not self.by_hand and not uses_slurm

    @property
    def world_size(self) -> int:
        return sum(len(devices) for devices in self.hosts.values())

    @property
    def per_node(self) -> int:
        return max(len(devices) for devices in self.hosts.values())


@dataclass(frozen=True)
class LaunchSpec:
    """One command: arguments (never a shell string), variables to set or remove, directory."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    unset: list[str] = field(default_factory=list)
    nodes: NodesSpec | None = None
    """What else belongs to a command that starts processes on other nodes."""

    @property
    def role(self) -> str:
        """`nodeN` for one of several commands by hand, but for the first; else empty."""
        follows = self.nodes is not None and self.nodes.by_hand and self.nodes.node_rank > 0
        return f"node{self.nodes.node_rank}" if self.nodes is not None and follows else ""

    @property
    def leads(self) -> bool:
        """Does this command's driver keep the step's records?"""
        return not self.role

    @property
    def log_name(self) -> str:
        """Its file in the step's logs; drivers on several nodes must not share one."""
        return f"console.{self.role}.log" if self.role else "console.log"

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of the command."""
        kept = {name: value for name, value in inherited.items() if name not in self.unset}
        if self.nodes is not None and self.nodes.clean:
            kept = {name: value for name, value in kept.items() if self.nodes.clean(name)}
        return {**kept, **self.env}

    def shell(self) -> str:
        """The command as a person would type it, quoted; only variables that we set."""
        lines = [f"cd {shlex.quote(self.cwd)}"]
        lines += [f"unset {shlex.quote(name)}" for name in self.unset]
        for name, value in self.env.items():
            if name == "PYTHONPATH":
                own = f"{PROJECT_ROOT}{os.pathsep}"
                rest = '"${PYTHONPATH:-}"' if value.startswith(own) else ""
                value = str(PROJECT_ROOT) if value == str(PROJECT_ROOT) or rest else value
                lines.append(
                    f"export {name}={shlex.quote(value)}{os.pathsep + rest if rest else ''}"
                )
            else:
                lines.append(f"export {name}={shlex.quote(value)}")
        lines += self._files()
        return "\n".join([*lines, f"{'exec ' * (not self._keeps_file)}{shlex.join(self.argv)}"])

    @property
    def _keeps_file(self) -> bool:
        return self.nodes is not None and self.nodes.env_file is not None

    def _files(self) -> list[str]:
        """Shell lines that make deepspeed's env file anew; it holds no secrets."""
        if self.nodes is None or self.nodes.env_file is None:
            return []
        return [
            'DS_ENV_FILE="$(mktemp)" && export DS_ENV_FILE',
            "trap 'rm -f \"$DS_ENV_FILE\"' EXIT",
            f"printf '%s' {shlex.quote(self.nodes.env_file)} >\"$DS_ENV_FILE\"",
        ]


@dataclass(frozen=True)
class NodesSpec:
    """How a command's processes on other nodes get what this one has."""

    hosts: list[str]
    """The nodes' names; for a command started by hand, this node alone is known."""
    forward: list[str] = field(default_factory=list)
    """Names of variables that travel in a private file, their values never on a command line."""
    env_file: str | None = None
    """Content of the file that deepspeed's DS_ENV_FILE names, where it is needed."""
    over_ssh: bool = False
    by_hand: bool = False
    node_rank: int = 0
    heartbeat_seconds: int = 60
    files: dict[str, str] = field(default_factory=dict)
    """Path -> content, written before the start (Slurm's batch script)."""
    clean: Callable[[str], bool] | None = None
    """Which inherited variables the command may see, where it would pass all of them on."""


class Launcher(Protocol):
    """Builds the command that starts `script args...` once per process of `placement`.

    One that has no way to other nodes by itself builds a single node's command, with `{node}` for
    the node's number, and launchers.py has it started everywhere.
    """

    def __call__(self, script: Path, args: Sequence[str], placement: Placement) -> list[str]:
        """Raises ConfigError where this launcher cannot do what is asked."""
        ...


def check_even(placement: Placement, launcher: str) -> None:
    """Raises ConfigError where nodes differ in what this launcher takes as equal.

    The number of processes and, on several nodes, that the devices are each node's first ones.
    """
    for host, devices in placement.hosts.items():
        if placement.multi_node and devices != list(range(len(devices))):
            raise ConfigError(
                f"launcher {launcher} takes the first devices of every node, the filters leave "
                f"{','.join(map(str, devices))} of {host}: filter whole hosts, or use --launcher "
                "deepspeed with pdsh"
            )
    counts = sorted({len(devices) for devices in placement.hosts.values()})
    if len(counts) > 1:
        raise ConfigError(
            f"launcher {launcher} starts the same number of processes on every node, the hostfile "
            f"gives {counts}: use --num-gpus, or --launcher deepspeed"
        )
