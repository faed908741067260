"""The launchers by name: `--launcher`."""

from __future__ import annotations

from launch import deepspeed, torchrun
from launch.spec import Launcher

LAUNCHERS: dict[str, Launcher] = {
    "deepspeed": deepspeed.command,
    "torchrun": torchrun.command,
}
