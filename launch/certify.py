"""`rlhf certify`: starts rlhf/certify/main.py, on one rank or several: torch is loaded there."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from launch.ports import free_port
from launch.spec import PROJECT_ROOT
from launch.torchrun import RUN

SCRIPT = PROJECT_ROOT / "rlhf" / "certify" / "main.py"


def main(argv: Sequence[str]) -> int:
    """The exit code of rlhf/certify/main.py: 0 if every check holds, 1 if not, 2 bad usage."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    made.add_argument("--num-gpus", "--processes", type=int, default=1, dest="ranks", metavar="N")
    flags, rest = made.parse_known_args(list(argv))
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    env["PYTHONPATH"] = os.pathsep.join([str(PROJECT_ROOT), *_given("PYTHONPATH")])
    if flags.ranks == 1:
        return subprocess.run([sys.executable, str(SCRIPT), *rest], env=env, check=False).returncode
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    ranks = [f"--nproc-per-node={flags.ranks}", *address]
    return subprocess.run([*RUN, *ranks, str(SCRIPT), *rest], env=env, check=False).returncode


def _given(name: str) -> list[str]:
    return [os.environ[name]] if os.environ.get(name) else []
