"""`rlhf serve-reward`: becomes rlhf/serving/reward.py, which loads torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from launch.devices import visible_gpus
from launch.spec import PROJECT_ROOT


def main(argv: Sequence[str]) -> int:
    """Does not return: this process becomes the server, which signals then reach by themselves."""
    paths = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if not visible_gpus(os.environ):
        env.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says at length that it found none
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", "rlhf.serving.reward", *argv], env)
