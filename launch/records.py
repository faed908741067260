"""What a run writes down about itself: pipeline.json, resolved.json and command.sh."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from launch.options import Options
from launch.plan import Plan, StepPlan
from launch.spec import LaunchSpec
from rlhf.errors import RequirementError
from rlhf.redact import hide, redact, redact_tree
from rlhf.store import RunDir, library_versions, read_json, write_json_atomic, write_text_atomic


def record_plan(options: Options, plan: Plan) -> None:
    """pipeline.json: what was asked, with which versions, and the command lines."""
    entry = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "asked": options.argv,
        "python": sys.executable,
        "recipe": str(plan.recipe) if plan.recipe else None,
        "from": str(options.source.run.path) if options.source else None,
        "world_size": plan.placement.world_size,
        "versions": library_versions(),
        "steps": [_entry(item) for item in plan.steps],
    }
    write_json_atomic(plan.run.pipeline, {**redact_tree(entry), "earlier": _earlier(plan.run)})


def _earlier(run: RunDir) -> list[Any]:
    """The commands given before in this run directory, oldest first."""
    if not run.pipeline.exists():
        return []
    try:
        last = dict(read_json(run.pipeline))
        return [*last.pop("earlier", []), last]
    except (RequirementError, ValueError, TypeError):
        return []  # a history that cannot be read stops no run


def _entry(item: StepPlan) -> dict[str, Any]:
    return {
        "step": item.step,
        "stage": item.stage.name,
        "action": "skip" if item.done else "run",
        "reason": item.reason,
        "parents": item.resolved.parents,
        "argv": item.spec.argv,
        "env": item.spec.env,
    }


def record_step(run: RunDir, item: StepPlan, spec: LaunchSpec) -> dict[str, Any]:
    """resolved.json, which the step's processes read, and command.sh, which starts them again.

    Both without secrets; returns those of resolved.json, as `rlhf.redact.hide` does.
    """
    shown, hidden = hide(item.resolved.model_dump(mode="json"))
    write_json_atomic(run.resolved(item.stage, item.act), shown)
    path = run.command(item.stage, item.act)
    path = path if spec.leads else path.with_stem(f"command.{spec.role}")
    write_script(path, redact(spec.shell()))
    return hidden


def write_script(path: Path, body: str) -> None:
    """An executable shell script, written whole or not at all."""
    text = f"#!/bin/sh\n# Starts this step again, as the driver did.\n{body}\n"
    write_text_atomic(path, text, mode=0o755)
