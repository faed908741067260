"""Two gloo ranks of a test's own program: starting them, and ending such a program."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.ports import free_port
from rlhf.engine import comm
from tests.unit import model_help as help_

TIMEOUT = 600


def two_ranks(module: str, out: Path, *arguments: str) -> None:
    """Runs `python -m MODULE OUT ARGUMENTS...` as two ranks; each touches OUT/doneK at its end.

    Fails with both logs (OUT/rankK.log) where one does not.
    """
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "RLHF_TEST_SCRATCH": str(help_.scratch()),
    }
    logs = [out / f"rank{rank}.log" for rank in (0, 1)]
    processes = []
    for rank, log in enumerate(logs):
        env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as stream:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, str(out), *arguments],
                    env=env,
                    cwd=help_.ROOT,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
            )
    end = time.monotonic() + TIMEOUT
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            if any(p.poll() for p in processes):
                break  # one failed; the other would wait for it
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if not all((out / f"done{rank}").exists() for rank in (0, 1)):
        pytest.fail("\n".join(log.read_text()[-4000:] for log in logs))


def finish(main: Callable[[Path], None]) -> None:
    """What such a program ends with: joins the other rank, runs `main(OUT)`, ends the process."""
    out = Path(sys.argv[1])
    try:
        comm.init_distributed()
        torch.manual_seed(0)
        main(out)
        (out / f"done{comm.rank()}").touch()
    finally:  # not a normal end: a destructor might wait for the other rank for ever
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(0 if (out / f"done{comm.rank()}").exists() else 1)
