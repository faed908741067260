"""PPO on two ranks against one: `python -m benchmarks.scaling --help`.

The same prompts in all, so each of two ranks has half of them. Each rank is a process with one
thread, pinned to a core of its own; the two sides run in turn (benchmarks/pairs.py). Only the
wall clock tells: CPU time would leave out waiting for the other rank.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairs import Worker, as_launched, compare, print_line, serve, worker
from benchmarks.workload import MODELS_AT, OurPPO, Workload, model_dirs


def run_rank(workload: Workload) -> None:
    """One rank: rank 0 asks the others to take part in each iteration, and is measured."""
    from rlhf.engine import comm

    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    ours = OurPPO(workload)

    def iteration() -> float:
        comm.all_reduce(torch.ones(()))  # rank 0 is asked, and so asks all
        ours.iteration()
        comm.barrier()
        return workload.rows

    if rank == 0:
        serve(iteration)
        comm.all_reduce(torch.zeros(()))
        return
    # The sum is 1 less than the ranks when rank 0 has been told to stop.
    while comm.all_reduce(torch.ones(())) == comm.world_size():
        ours.iteration()
        comm.barrier()


def ranks(stack: ExitStack, count: int, workload: Workload) -> Worker:
    """Starts `count` ranks; the first is the side that is measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    argv = [sys.executable, "-m", "benchmarks.scaling", "--rank", json.dumps(asdict(workload))]

    def env(rank: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            MODELS_AT: str(Path(model_dirs(workload.model, workload.seed)[0]).parent),
        }

    others = [
        subprocess.Popen(argv, env=os.environ | env(rank), stdout=subprocess.DEVNULL)
        for rank in range(1, count)
    ]
    for process in others:
        stack.callback(process.wait, 60)
    return stack.enter_context(worker(argv, env(0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["6m", "135m"], default="6m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=32, help="prompts per iteration, in all")
    parser.add_argument("--micro", type=int, default=16, help="rows per forward")
    parser.add_argument("--early", action="store_true", help="mean answer 24 tokens, not 64")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        run_rank(Workload(**json.loads(args.rank)))
        return
    as_launched()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("benchmarks.scaling needs two cores")
    workload = Workload(
        model=args.model, dtype=args.dtype, rows=args.rows, micro=args.micro, early=args.early
    )
    with ExitStack() as stack:
        two, one = (ranks(stack, count, workload) for count in (2, 1))
        result: dict[str, Any] = compare(two, one, pairs=args.pairs)
    settings = {k: v for k, v in vars(args).items() if k != "rank"}
    print_line("scaling", settings, result | {"unit": "samples", "ours_is": "two ranks"})


if __name__ == "__main__":
    main()
