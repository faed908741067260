"""Step 3's evaluation as an act of its own: `python train.py evaluate RUN`, and the evaluation of a
run that was cut off between publishing and its verdict."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from launch import execute, failure
from launch.devices import place
from launch.gate import prove
from launch.options import (
    SETTINGS,
    Parser,
    add_settings,
    flag_values,
    normalize_flags,
    split_overrides,
)
from launch.plan import Plan, StepPlan, launch_spec
from launch.runs import find_run
from launch.supervise import Outcome
from rlhf import stages
from rlhf.config.load import build_config, parse_overrides, with_values
from rlhf.config.resolve import absolute_paths, refuse_redacted
from rlhf.config.schema import ResolvedStep
from rlhf.errors import ArtifactError, EvaluationFailed, RequirementError
from rlhf.redact import redact
from rlhf.store import MANIFEST, NO_VERDICT, Manifest, RunDir, find_evaluation, read_manifest

ACT = "evaluation"
FLAGS = [
    flag for flag, (key, *_) in SETTINGS.items() if key.startswith(("launch.", "hub.", "data."))
]


def main(argv: Sequence[str]) -> int:
    """`evaluate RUN`: 0 when there is a new verdict. Raises EvaluationFailed, and what plans do."""
    run, item, dry_run = parse(argv)
    print(redact(_describe(run, item)), flush=True)
    if dry_run:
        return 0
    role = item.spec.role
    with execute.locked(run.path, role, item.resolved.config.launch.grace_seconds) as lock:
        evaluate(run, item, {}, lock)
    print(verdict_text(run))
    return 0


def parse(argv: Sequence[str]) -> tuple[RunDir, StepPlan, bool]:
    """The run, what its processes are told, and whether to stop at that."""
    flags, asked = parse_flags(argv)
    run = find_run(flags.run, "evaluate")
    if not run.artifact("ppo").is_dir():
        raise RequirementError(
            f"evaluate {flags.run}: {stages.PPO} has published nothing in {run.path}: "
            f"make it with: python train.py --step {stages.PPO.number} --name {run.path.name}"
        )
    manifest = prove(run.artifact("ppo"), "ppo", quick=True)
    config = build_config(dict(manifest.config), {"": str(run.artifact("ppo") / MANIFEST)})
    if flags.num_gpus and config.launch.deployment_type == "single_gpu":  # as train.py takes it
        asked.setdefault("launch.deployment_type", "single_node")
    config = absolute_paths(with_values(config, asked))
    refuse_redacted(config)
    placement = place(config.launch)
    resolved = ResolvedStep(
        step=stages.PPO.number,
        stage=stages.PPO.name,
        run_dir=str(run.path),
        world_size=placement.world_size,
        parents=_parents(run, manifest),
        config=config,
    )
    spec = launch_spec(resolved, placement, run, ACT)
    return run, StepPlan(resolved, spec, [], act=ACT), flags.dry_run


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags, and all settings that are asked for. Raises ConfigError."""
    tokens, overrides = split_overrides(normalize_flags(argv))
    flags = parser().parse_args(tokens)
    values, _ = flag_values(flags)
    asked = {**parse_overrides(overrides), **values}
    for name in ("judge", "prompts"):
        if getattr(flags, name) is not None:
            asked[f"step3.eval.{name}"] = getattr(flags, name)
    if "data.path" in asked:  # nothing trains on it: all of its prompts are held out
        asked.setdefault("data.eval_fraction", 1.0)
    return flags, asked


def parser() -> Parser:
    """The flags with their help."""
    made = Parser(
        prog="train.py evaluate",
        allow_abbrev=False,
        description="Evaluates the policy of a finished run again, with its own settings but for "
        "those that are given. Answers to the same prompts are judged again without being "
        "generated again. The verdict that is there is replaced when the new one is whole.",
    )
    made.add_argument("run", metavar="RUN", help="the run's directory, or its name below output/")
    made.add_argument("--judge", metavar="NAME", help="as step3.eval.judge")
    made.add_argument("--prompts", type=int, metavar="N", help="as step3.eval.prompts")
    made.add_argument("--dry-run", action="store_true", help="print the command, then stop")
    add_settings(made, FLAGS)
    return made


def evaluate(run: RunDir, item: StepPlan, env: Mapping[str, str], lock: int) -> None:
    """Launches the evaluation and proves its result. Raises EvaluationFailed."""
    before = _stamp(run)
    outcome = execute.launch(run, item, dict(env), lock)
    if item.spec.leads:  # the verdict is written where rank 0 is
        _confirm(run, item, outcome, fresh=_stamp(run) != before)


def make_up(plan: Plan, item: StepPlan, env: Mapping[str, str], lock: int) -> None:
    """Evaluates a step 3 that is done and has no verdict."""
    print(f"\n{item.stage} is done, but {item.unevaluated}: its evaluation starts", flush=True)
    resolved = item.resolved
    spec = launch_spec(resolved, plan.placement, plan.run, ACT)
    evaluate(plan.run, replace(item, act=ACT, spec=spec), env, lock)


def confirm(run: RunDir, item: StepPlan, outcome: Outcome) -> None:
    """After a step 3: has it evaluated what it published? Raises EvaluationFailed."""
    _confirm(run, item, outcome, fresh=True)


def verdict_text(run: RunDir) -> str:
    """What the evaluation of the published policy says, for a person; empty if there is none."""
    try:
        if find_evaluation(run)[0] is None:
            return ""
    except ArtifactError:
        return ""
    names = (run.artifact("evaluation") / name for name in ("verdict.txt", NO_VERDICT))
    text = next(path for path in names if path.exists()).read_text(encoding="utf-8")
    return "\n" + text.strip("\n")


def _confirm(run: RunDir, item: StepPlan, outcome: Outcome, *, fresh: bool) -> None:
    found, why = find_evaluation(run)
    if found is not None and fresh:
        return
    logs = run.logs(item.stage)
    records = failure.read_records(logs)
    first = records[0] if records else None
    if first is not None and first.remedy == first.message:  # a user's mistake says it all
        why = first.message
    else:
        absent = [] if records else ["rank 0"]
        why = str(failure.explain(item.stage, outcome, logs, why, absent))
    kept = "the verdict that was there stays" if found is not None else "there is no verdict"
    raise EvaluationFailed(
        f"the evaluation failed: {why}\n"
        f"The trained models are published in {run.artifact('ppo')}; {kept}. "
        f"Once that is mended, evaluate them with:\n  {command(run, item)}"
    )


def command(run: RunDir, item: StepPlan) -> str:
    """What repeats the evaluation."""
    judge = item.resolved.config.step3.eval.judge
    chosen = ["--judge", judge] if judge else []
    return shlex.join(["python", "train.py", "evaluate", str(run.path), *chosen])


def _describe(run: RunDir, item: StepPlan) -> str:
    config = item.resolved.config
    asked = config.step3.eval
    judge = asked.judge or "the data's own, if it has one"
    return "\n".join(
        [
            f"evaluate {run.artifact('ppo')}",
            f"data     {', '.join(config.data.path)}",
            f"asked    {asked.prompts} answers of each model, judge: {judge}",
            f"         $ {shlex.join(item.spec.argv)}",
        ]
    )


def _parents(run: RunDir, manifest: Manifest) -> dict[str, str]:
    """What the policy was made from; this run's own artifacts wherever the run is now."""
    found = {}
    for name, record in manifest.parents.items():
        own = run.artifact(name)
        ours = record.id and (own / MANIFEST).is_file() and read_manifest(own).id == record.id
        found[name] = str(own) if ours else record.path
    return found


def _stamp(run: RunDir) -> Any:
    try:
        status = (run.artifact("evaluation") / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
