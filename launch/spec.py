"""What is started, and what a launcher is."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

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

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of the command."""
        kept = {name: value for name, value in inherited.items() if name not in self.unset}
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
        return "\n".join([*lines, f"exec {shlex.join(self.argv)}"])


class Launcher(Protocol):
    """Builds the command that starts `script args...` once per process of `placement`."""

    def __call__(self, script: Path, args: Sequence[str], placement: Placement) -> list[str]:
        """Raises ConfigError where this launcher cannot do what is asked."""
        ...
