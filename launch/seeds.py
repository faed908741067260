"""`--seeds 0 1 2 3`: a run for each seed, one after the other, then one verdict over them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.options import Options, normalize_flags, parse_options
from launch.plan import make_plan, plan_json
from launch.spec import PROJECT_ROOT
from rlhf.errors import ConfigError, EvaluationFailed
from rlhf.redact import redact_tree
from rlhf.store import RunDir

INTERRUPTED = 128


@dataclass(frozen=True)
class SeedRun:
    """One seed's run and the command line that makes it."""

    seed: int
    argv: list[str]
    run: RunDir


def run_all(options: Options, main: Callable[[Sequence[str]], int]) -> int:
    """The exit code of the first run that failed, else 0.

    `main`: what runs one command line and gives its exit code. What is done is skipped and what was
    interrupted resumes, as in any run; a seed that fails costs the others nothing. Raises
    ConfigError before the first one starts, EvaluationFailed where the verdicts cannot be pooled.
    """
    asked = runs(options)
    pooled = options.run.path.with_name(f"{options.config.name}-seeds")
    if (pooled / "pipeline.json").exists():
        raise ConfigError(
            f"--seeds: {pooled} is a run, and the verdict over the seeds would be written there: "
            "choose another --name"
        )
    if options.as_json:
        plans = [plan_json(make_plan(parse_options(one.argv))) for one in asked]
        print(json.dumps(redact_tree({"seeds": plans, "pooled": str(pooled)}), indent=2))
        return 0
    failed: dict[int, int] = {}
    for number, one in enumerate(asked, 1):
        print(f"\nseed {one.seed} ({number} of {len(asked)}): {one.run.path}", flush=True)
        if code := main(one.argv):
            failed[one.seed] = code
            if code > INTERRUPTED:  # a person stopped it: the same command goes on from here
                return code
    if not options.dry_run and any(stage.evaluates for stage in options.stages):
        pool([one.run for one in asked if one.seed not in failed], pooled)
    for seed, code in failed.items():
        print(f"seed {seed} failed with exit code {code}: see above", file=sys.stderr)
    return next(iter(failed.values()), 0)


def runs(options: Options) -> list[SeedRun]:
    """What is run, in the order asked for."""
    kept = without(normalize_flags(options.argv))
    found = []
    for seed in options.seeds:
        name = f"{options.config.name}-seed{seed}"
        run = RunDir(options.run.path.with_name(name))
        found.append(SeedRun(seed, [*kept, "--seed", str(seed), "--name", name], run))
    return found


def without(tokens: Sequence[str]) -> list[str]:
    """The command line without --seeds and without the run's name."""
    kept: list[str] = []
    skipping = ""
    for token in tokens:
        flag, equals, _ = token.partition("=")
        if flag in ("--seeds", "--name"):
            skipping = "" if equals else flag
        elif token.startswith("name=") or skipping == "--name":
            skipping = ""
        elif not (skipping == "--seeds" and token.lstrip("-").isdigit()):
            skipping = ""
            kept.append(token)
    return kept


def pool(done: Sequence[RunDir], pooled: Path) -> None:
    """Prints one verdict over all runs and writes it to `pooled`. Raises EvaluationFailed."""
    if len(done) < 2:
        print(f"\n{len(done)} of the seeds' runs is done: a verdict over seeds needs two or more")
        return
    print(flush=True)
    # In a process of its own: statistics need libraries that the driver does without.
    argv = [sys.executable, "-m", "rlhf.evaluation.seeds", "--write", str(pooled)]
    code = subprocess.run([*argv, *(str(run.path) for run in done)], cwd=PROJECT_ROOT).returncode
    if code:
        raise EvaluationFailed(f"the verdicts of {len(done)} seeds could not be pooled: see above")
