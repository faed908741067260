"""The plan: for each step asked for, what it builds on, what it gets, and how it is started."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.devices import place
from launch.gate import (
    Parent,
    base_models,
    find_parents,
    finished_step,
    recovery_scale,
    unfinished,
)
from launch.launchers import build_spec
from launch.memory import describe as describe_memory
from launch.memory import keeps_memory, machine_of, step_report
from launch.options import Options
from launch.spec import PROJECT_ROOT, LaunchSpec, Placement
from rlhf.config.load import with_values
from rlhf.config.resolve import (
    absolute_paths,
    accumulation,
    describe_inherited,
    resolve_step,
    rows_per_step,
)
from rlhf.config.rewards import MODEL, described
from rlhf.config.schema import ResolvedStep, RunConfig
from rlhf.config.trees import at
from rlhf.plan.advise import Machine
from rlhf.plan.report import StepReport, as_json
from rlhf.stages import Stage
from rlhf.store import Manifest, RunDir, find_evaluation, jsonable


@dataclass(frozen=True)
class StepPlan:
    """One step: run it (with `spec`), or it is already done (`manifest`)."""

    resolved: ResolvedStep
    spec: LaunchSpec
    parents: list[Parent]
    manifest: Manifest | None = None
    reason: str = ""
    """Why it runs again although there is an artifact."""
    replaces: Manifest | None = None
    """The finished artifact that it would replace."""
    fresh: bool = False
    """It starts from its beginning, whatever checkpoints there are."""
    saved: str = ""
    """The checkpoint that it goes on from."""
    needs: StepReport | None = None
    """Its memory and time; None: not planned, for the reason in `not_planned`."""
    not_planned: str = ""
    act: str = ""
    """"evaluation": only that; the step is done."""
    unevaluated: str = ""
    """Why a stage that is done has still to be evaluated."""
    evaluated_otherwise: str = ""
    """How its evaluation differs from what is asked for now; it is repeated by command only."""

    @property
    def stage(self) -> Stage:
        return self.resolved.row

    @property
    def step(self) -> int:
        return self.stage.number

    @property
    def done(self) -> bool:
        return self.manifest is not None


@dataclass(frozen=True)
class Plan:
    run: RunDir
    config: RunConfig
    recipe: Path | None
    options: Options
    placement: Placement
    machine: Machine
    steps: list[StepPlan] = field(default_factory=list)

    @property
    def role(self) -> str:
        """Empty for the driver that keeps the run's records; else which node's driver this is."""
        follows = self.placement.by_hand and self.placement.node_rank
        return f"node{self.placement.node_rank}" if follows else ""


def make_plan(options: Options) -> Plan:
    """Looks at the run directory, the machine and the settings; changes nothing.

    Raises ConfigError, RequirementError, ArtifactError.
    """
    config = absolute_paths(with_values(options.config, base_models(options)))
    placement = place(config.launch)
    machine = machine_of(placement, config.launch)
    sft_base = options.actor_model or config.step1.model.name
    bases = {"sft": sft_base, "reward": options.reward_model or config.step2.model.name or sft_base}
    done: dict[str, Manifest | None] = {}
    steps: list[StepPlan] = []
    for stage in options.stages:
        parents = find_parents(options, stage, done)
        resolved = resolve_step(
            config,
            stage,
            run_dir=options.run.path,
            world_size=placement.world_size,
            parents={parent.name: parent.path for parent in parents},
            parent_configs={p.name: p.config for p in parents if p.config or p.here},
        )
        found, reason = finished_step(options, resolved, parents)
        manifest, replaced = (None, found) if reason else (found, None)
        done[stage.makes] = manifest
        fresh = options.force or config.checkpoint.resume == "never"
        saved = "" if fresh or manifest is not None else unfinished(options, resolved, parents)
        resolved.learning_rate_scale = 1.0 if fresh else recovery_scale(options.run, stage)
        needs, why_not = step_report(resolved, machine, bases)
        kept = keeps_memory(config.launch.keep_memory, needs, machine)
        resolved.config = with_values(resolved.config, {"launch.keep_memory": kept})
        spec = launch_spec(resolved, placement, options.run)
        item = StepPlan(
            resolved=resolved, spec=spec, parents=parents, manifest=manifest, reason=reason,
            replaces=replaced, fresh=fresh, saved=saved, needs=needs, not_planned=why_not,
        )  # fmt: skip
        if stage.evaluates and manifest is not None:
            evaluation, why = find_evaluation(options.run)
            note = _otherwise(options.run, evaluation, config) if evaluation else ""
            item = replace(item, unevaluated=why, evaluated_otherwise=note)
        steps.append(item)
    return Plan(options.run, config, options.recipe, options, placement, machine, steps)


def _otherwise(run: RunDir, evaluation: Manifest, config: RunConfig) -> str:
    """What is asked of an evaluation now, and was not when it was made; "" if nothing."""
    before = dict(evaluation.config.get("eval", {}))
    now = jsonable(config.step3.eval)
    changed = {key: now[key] for key in before if key in now and before[key] != now[key]}
    if not changed:
        return ""
    was = ", ".join(f"step3.eval.{key} {before[key]}" for key in changed)
    given = shlex.join(f"step3.eval.{k}={'null' if v is None else v}" for k, v in changed.items())
    return (
        f"its evaluation was made with {was} and stays; for another: "
        f"python train.py evaluate {run.path} {given}"
    )


def launch_spec(
    resolved: ResolvedStep, placement: Placement, run: RunDir, act: str = ""
) -> LaunchSpec:
    """The command that starts the step's processes; `act`: "evaluation", which is a script of its
    own."""
    stage = resolved.row
    script = PROJECT_ROOT / stage.folder / f"{act or 'main'}.py"
    arguments = ["--config", str(run.resolved(stage, act))]
    return build_spec(resolved.config, script, arguments, placement)


def describe(plan: Plan) -> str:
    """The plan as text, in the order in which one would tell it."""
    source = plan.options.source
    none = "none: the settings' defaults (--actor-model names a model of its own)"
    recipe = plan.recipe or (f"the settings of {source.run.path} (--from)" if source else none)
    lines = [
        f"run      {plan.config.name}: {plan.run.path}",
        f"recipe   {recipe}",
        f"machine  {_machine(plan)}",
        f"data     {', '.join(plan.config.data.path)}",
        *_left_out(plan),
        *(f"{'' if number else 'env':8} {line}" for number, line in enumerate(_environment(plan))),
    ]
    for item in plan.steps:
        lines += ["", *describe_step(item, plan.machine)]
    return "\n".join(lines)


def _left_out(plan: Plan) -> list[str]:
    """Whether step 2 was left out unasked, and what that means for its share of the rows."""
    if not plan.options.without_reward_model:
        return []
    first, second, third = plan.config.data.split
    lines = ["steps    1 and 3: no term of step3.rewards is the reward model, so step 2 has no use"]
    if second:
        lines.append(
            f"         its share of the rows (data.split {first:g},{second:g},{third:g}) is not "
            f"trained on; data.split={first:g},0,{second + third:g} gives it to step 3"
        )
    return lines


def describe_step(item: StepPlan, machine: Machine) -> list[str]:
    """What a step does, from what, with which batches and memory, and its command."""
    stage, resolved = item.stage, item.resolved
    head = f"{stage}   {stage.title}: {_origin(item)} -> {stage.folder}/artifact"
    if item.manifest is not None:
        done = f"already done (artifact {item.manifest.id[:12]}); --force repeats it"
        again = [f"evaluation runs: {item.unevaluated}"] if item.unevaluated else []
        again += [item.evaluated_otherwise] if item.evaluated_otherwise else []
        return [head, *(f"         {line}" for line in [done, *again])]
    lines = [head]
    if item.reason:
        lines.append(f"         again: {item.reason}")
    if item.saved:
        lines.append(f"         goes on from {item.saved}")
    lines += [f"         {parent.note}" for parent in item.parents if parent.note]
    lines += [f"         {line}" for line in describe_inherited(resolved)]
    lines.append(f"         {_batches(resolved)}")
    lines += [f"         {line}" for line in describe_memory(item.needs, item.not_planned, machine)]
    lines.append(f"         $ {shlex.join(item.spec.argv)}")
    return lines


def _environment(plan: Plan) -> list[str]:
    """Directory and variables, the same for all steps."""
    return plan.steps[0].spec.shell().splitlines()[:-1]


def _origin(item: StepPlan) -> str:
    config, stage, parents = item.resolved.config, item.stage, item.resolved.parents
    if own := at(config, stage.base) if stage.base else None:
        return str(own)
    first = next((parents[need.kind] for need in stage.needs if need.kind in parents), "")
    if not stage.generates:
        return first
    rewards = described(config.step3.rewards, {MODEL: parents.get("reward", "")})
    return f"{first}, rewarded by {rewards}"


def _batches(resolved: ResolvedStep) -> str:
    config, stage, world = resolved.config, resolved.row, resolved.world_size
    passes = accumulation(config, stage, world)
    rows = rows_per_step(config, stage)
    if stage.generates:
        minibatches = config.step3.ppo.minibatches
        what = f"{rows * minibatches} answers per iteration, {minibatches} minibatch(es)"
    else:
        what = f"{rows} {'pairs' if stage.rows == 'pairs' else 'rows'} per optimiser step"
    share = f"{world} process(es), up to {passes} forward pass(es) each"
    return f"{what}: {share} of {at(config, stage.micro_batch)} ({stage.micro_batch})"


def _machine(plan: Plan) -> str:
    placement = plan.placement
    device = "GPU" if placement.accelerator == "cuda" else "CPU"
    where = f" on {len(placement.hosts)} host(s)" if placement.multi_node else ""
    threads = plan.steps[0].spec.env.get("OMP_NUM_THREADS") if plan.steps else None
    extra = f", {threads} thread(s) each" if threads else ""
    launcher = plan.config.launch.launcher
    return f"{placement.world_size} {device} process(es){where}{extra}; launcher {launcher}"


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan for machines."""
    return {
        "name": plan.config.name,
        "run_dir": str(plan.run.path),
        "recipe": str(plan.recipe) if plan.recipe else None,
        "accelerator": plan.placement.accelerator,
        "world_size": plan.placement.world_size,
        "master_port": plan.placement.master_port,
        "config": plan.config.model_dump(mode="json"),
        "steps": [
            {
                "step": item.step,
                "name": item.stage.folder,
                "action": "skip" if item.done else "run",
                "reason": item.reason,
                "evaluates": bool(item.unevaluated) or (item.stage.evaluates and not item.done),
                "goes_on_from": item.saved,
                "parents": item.resolved.parents,
                "notes": [parent.note for parent in item.parents if parent.note],
                "inherited": describe_inherited(item.resolved),
                "accumulation": accumulation(
                    item.resolved.config, item.stage, item.resolved.world_size
                ),
                "needs": as_json(item.needs) if item.needs else None,
                "argv": item.spec.argv,
                "env": item.spec.env,
                "unset": item.spec.unset,
                "cwd": item.spec.cwd,
            }
            for item in plan.steps
        ],
    }
