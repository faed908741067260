"""All checks, in the order of what they cost; and their lines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TextIO

import torch

from rlhf.certify import exact, pipeline, reward_model, tabular
from rlhf.certify.check import Check
from rlhf.certify.problem import make_problem
from rlhf.engine import comm

# What a full run and a quick one spend: iterations of tables, of the engine, steps of step 2.
FULL, QUICK = (600, 250, 200), (300, 200, 150)


def checks(seed: int, *, quick: bool, zero_stage: int = 0) -> Iterator[Check]:
    """All checks, the cheap ones first; each is yielded as soon as it is measured."""
    tables, engine, steps = QUICK if quick else FULL
    yield from exact.estimators()
    yield from exact.best_of_n_bounds()
    yield from exact.two_ranks()
    problem = make_problem(seed, with_eos=False, prompts=1)
    bound = 0.005 if quick else 0.002
    for case in tabular.CASES:
        name = f"table: {case.name}: KL to its end"
        yield Check(name, tabular.distance(problem, case, seed, tables), bound, "nats")
    yield from pipeline.parts(seed, zero_stage)
    yield from reward_model.bradley_terry(seed, steps, zero_stage)
    cases = pipeline.CASES[:1] if quick else pipeline.CASES
    for run in cases:
        yield from pipeline.converges(run, seed, engine, zero_stage)


def run(console: TextIO, *, seed: int, quick: bool, zero_stage: int, as_json: bool) -> int:
    """The exit code: 0 if every check holds, else 1. Rank 0 writes to `console`."""
    torch.set_num_threads(1)
    rank, world = comm.init_distributed()
    began, found = time.monotonic(), []
    for check in checks(seed, quick=quick, zero_stage=zero_stage):
        found.append(check)
        if rank == 0 and not as_json:
            print(check.line(), file=console, flush=True)
    failed = sum(not check.holds for check in found)
    if rank == 0 and as_json:
        rows = [vars(check) | {"holds": check.holds} for check in found]
        facts = {"seed": seed, "quick": quick, "zero_stage": zero_stage, "ranks": world}
        print(json.dumps({"checks": rows, "failed": failed, **facts}), file=console, flush=True)
    elif rank == 0:
        outcome = f"{failed} FAILED" if failed else "all hold"
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        seconds = time.monotonic() - began
        print(
            f"{len(found)} checks, {outcome} ({seconds:.0f} s, {ranks})", file=console, flush=True
        )
    comm.barrier()
    comm.shutdown()
    return 1 if failed else 0
