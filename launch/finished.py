"""Nothing that is finished is replaced unasked, and nothing goes on from data that was replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.checks import BAD_SETTING, Check
from launch.plan import Plan, StepPlan
from rlhf.config.trees import flatten
from rlhf.errors import ArtifactError, ConfigError
from rlhf.stages import Stage
from rlhf.store import Manifest, RunDir, read_manifest
from rlhf.store.checkpoints import newest

Sources = Sequence[Mapping[str, Any]]
# Figures by which a person knows a finished step again, by the last part of their name.
_FIGURES = ("perplexity", "accuracy", "gain", "gain_in_sft_std")


def check_finished(plan: Plan, sources: Sources | None) -> list[Check]:
    """A check for each step that is finished and would be replaced, or was made from other data."""
    checks: list[Check] = []
    for item in plan.steps:
        if item.replaces is not None and not plan.options.force:
            checks.append(_replaced(plan, item, item.replaces))
        if item.manifest is not None:
            checks.append(_kept(plan, item, item.manifest, sources))
        if item.saved:
            checks += _saved(plan, item, sources)
    return checks


def forced_notes(plan: Plan) -> list[str]:
    """With --force: what is replaced, and which finished steps were made from it."""
    notes = []
    for item in plan.steps:
        if item.replaces is None:
            continue
        notes.append(f"{item.stage} replaces {describe(item.stage, item.replaces)}")
        notes += [f"  {text}" for text in below(plan, item.stage)]
    return notes


def _replaced(plan: Plan, item: StepPlan, manifest: Manifest) -> Check:
    found = f"{describe(item.stage, manifest)} would be replaced: {item.reason}"
    if after := below(plan, item.stage):
        found += f"; {'; '.join(after)}"
    forced = f"{plan.options.command(*plan.options.stages)} --force"
    return Check(
        f"{item.stage} is finished", "FAIL", found, "your word for it",
        f"to replace it: {forced}; to keep it: another --name", BAD_SETTING,
    )  # fmt: skip


def _kept(plan: Plan, item: StepPlan, manifest: Manifest, sources: Sources | None) -> Check:
    what = f"{item.stage} is finished"
    told = data_changes(manifest.data_sources, sources)
    if not told:
        return Check(what, "ok", describe(item.stage, manifest))
    found = f"{describe(item.stage, manifest)} was made from other data: {'; '.join(told)}"
    if plan.config.checkpoint.resume == "always":
        return Check(what, "warn", f"{found}; it is kept (--resume always)")
    forced = f"{plan.options.command(*plan.options.stages)} --force"
    return Check(
        what, "FAIL", found, "the same data",
        f"to make it again: {forced}; to keep it and go on: --resume always; or another --name",
        BAD_SETTING,
    )  # fmt: skip


def _saved(plan: Plan, item: StepPlan, sources: Sources | None) -> list[Check]:
    """An unfinished step cannot go on with other rows: what it has seen would be another's."""
    found = newest(plan.run.resume(item.stage))
    told = data_changes(found[1].data_sources, sources) if found else []
    if not found or not told:
        return []
    return [Check(
        f"{item.stage} goes on from {found[0].name}", "FAIL",
        f"it was saved with other data: {'; '.join(told)}", "the same data",
        "to start the step again: --resume never", BAD_SETTING,
    )]  # fmt: skip


def data_changes(before: Sources | None, now: Sources | None) -> list[str]:
    """How the content of the data differs, by path; [] too where one of them is not known."""
    if before is None or now is None:
        return []
    old, new = ({str(one["name"]): one for one in some} for some in (before, now))
    told = []
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in old or name not in new:
            continue  # another data.path: a setting, which is compared as one
        if old[name]["fingerprint"] != new[name]["fingerprint"]:
            told.append(f"data.path {name} {_difference(old[name], new[name])}")
    return told


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    then, today = old.get("rows"), new.get("rows")
    if then is None or today is None or then == today:
        return f"has other content than then (now {str(new['fingerprint'])[:12]})"
    word = "more" if today > then else "fewer"
    return f"has {abs(today - then):,} {word} rows than then (now {today:,})"


def refuse_changed_data(plan: Plan, item: StepPlan, now: Sources | None) -> None:
    """Before a later step of the same command: is the data still what the checks found?

    Raises ConfigError, unless `--resume always` says to go on.
    """
    told = data_changes(item.resolved.data_sources, now)
    if not told:
        return
    if plan.config.checkpoint.resume == "always":
        print(f"warning: {item.stage}: {'; '.join(told)} (--resume always)")
        return
    raise ConfigError(
        f"{item.stage}: the data changed while this command was running: {'; '.join(told)}. "
        "The steps before it have seen other rows: start them again with --force, or go on with "
        "--resume always"
    )


def below(plan: Plan, stage: Stage) -> list[str]:
    """The finished steps after one that is replaced and that this command does not make again."""
    pipeline = plan.options.pipeline
    found = []
    for later in pipeline[pipeline.index(stage) + 1 :]:
        manifest = finished(plan.run, later)
        if manifest is not None and later not in plan.options.stages:
            found.append(
                f"{later} ({describe(later, manifest)}) was made from it and no longer fits"
            )
    return found


def finished(run: RunDir, stage: Stage) -> Manifest | None:
    """The manifest of a step's artifact, its files not read; None where there is no whole one."""
    try:
        manifest = read_manifest(run.artifact(stage.makes))
    except ArtifactError:
        return None
    return manifest if manifest.kind == stage.makes else None


def describe(stage: Stage, manifest: Manifest) -> str:
    """Which artifact, when it was made, and its figures."""
    flat = flatten(manifest.metrics)
    shown = []
    for name, value in flat.items():
        last = name.rsplit(".", 1)[-1]
        if last in _FIGURES and isinstance(value, (int, float)) and name.count(".") < 2:
            shown.append(f"{last} {value:.3g}")
    figures = f", {', '.join(shown)}" if shown else ""
    return f"{stage.title} artifact {manifest.id[:12]}, made {manifest.created}{figures}"
