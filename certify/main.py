"""The certificate: every algorithm reaches the optimum that can be computed (docs/certificate.md).

Started by `rlhf certify` in a process of its own, on one rank or, by a launcher, on several.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from certify import exact, pipeline, reward_model, tabular
from certify.check import Check
from certify.problem import make_problem
from rlhf.engine import comm

# What a run without --quick and one with it spend: iterations of tables, of the engine, of step 2.
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


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 if every check holds, else 1."""
    flags = parser().parse_args(argv)
    out = os.dup(1)
    os.dup2(2, 1)  # libraries print what they like; the certificate's lines are alone on stdout
    torch.set_num_threads(1)
    rank, world = comm.init_distributed()
    began, found = time.monotonic(), []
    with open(out, "w", encoding="utf-8") as console:
        for check in checks(flags.seed, quick=flags.quick, zero_stage=flags.zero_stage):
            found.append(check)
            if rank == 0 and not flags.json:
                print(check.line(), file=console, flush=True)
        failed = [check for check in found if not check.holds]
        if rank == 0:
            seconds = time.monotonic() - began
            print(_end(flags, found, failed, seconds, world), file=console, flush=True)
    comm.barrier()
    comm.shutdown()
    return 1 if failed else 0


def _end(
    flags: argparse.Namespace,
    found: list[Check],
    failed: list[Check],
    seconds: float,
    world: int,
) -> str:
    if flags.json:
        rows = [vars(check) | {"holds": check.holds} for check in found]
        facts = {"seed": flags.seed, "quick": flags.quick, "zero_stage": flags.zero_stage}
        return json.dumps({"checks": rows, "failed": len(failed), "ranks": world, **facts})
    outcome = f"{len(failed)} FAILED" if failed else "all hold"
    return f"{len(found)} checks, {outcome} ({seconds:.0f} s, {world} rank(s))"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="rlhf certify", allow_abbrev=False, description=__doc__)
    add = made.add_argument
    add("--quick", action="store_true", help="fewer iterations, PPO alone through the engine")
    add("--json", action="store_true", help="one JSON object instead of lines")
    add("--seed", type=int, default=0, help="of rewards, references and samples; default 0")
    add("--zero-stage", type=int, choices=(0, 1, 2, 3), default=0, help="default 0")
    return made


if __name__ == "__main__":
    sys.exit(main())
