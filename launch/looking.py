"""What needs more than the driver has, asked in processes of their own: data, a user's functions.

`python -m rlhf.data.preview` opens the data, `python -m rlhf.rewards` imports judges and rewards.
Both run in the environment of the step's processes and without torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from launch.checks import MISSING, Check
from launch.nodes import private_file
from launch.plan import Plan, StepPlan
from rlhf.config.rewards import MODEL

LOOK_SECONDS = 600.0
JUDGE_SECONDS = 120.0


@dataclass(frozen=True)
class Looked:
    """What was found; `sources` as in rlhf/data/preview.py, None where nothing came of it."""

    data: list[Check] = field(default_factory=list)
    functions: list[Check] = field(default_factory=list)
    sources: list[dict[str, Any]] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def lines(self, step: int) -> list[str]:
        """The preview of a step's rows."""
        found = [stage["lines"] for stage in self.stages if stage["step"] == step]
        return [str(line) for lines in found for line in lines]


def look(plan: Plan, *, download: bool = False) -> Looked:
    """Asks about data and a user's functions at the same time."""
    with ThreadPoolExecutor(2) as pool:
        functions = pool.submit(_functions, plan)
        data = look_at_data(plan, download=download)
        return Looked(data.data, functions.result(), data.sources, data.stages, data.files)


def look_at_data(plan: Plan, *, download: bool = False) -> Looked:
    items = [item for item in plan.steps if not item.done] or plan.steps[:1]
    with ExitStack() as stack:
        files = [
            str(stack.enter_context(private_file("resolved.json", item.resolved.model_dump_json())))
            for item in items
        ]
        command = ["rlhf.data.preview", *files, *(["--download"] if download else [])]
        answer, trouble = _ask(items[0], command, LOOK_SECONDS, offline=not download)
    if answer is None:
        return Looked([Check("data", "FAIL", f"it could not be looked at: {trouble}")])
    checks = [_problem(one) for one in answer["problems"]]
    checks += [Check("data", "warn", note) for note in answer.get("notes", [])]
    if not answer["problems"]:
        checks += [
            Check(f"data {one['name']}", "ok", f"{_rows(one)}, {str(one['fingerprint'])[:12]}")
            for one in answer.get("sources", [])
        ]
    return Looked(
        checks, [], answer.get("sources"), answer.get("stages", []), answer.get("files", [])
    )


def _rows(source: dict[str, Any]) -> str:
    return "rows not counted" if source.get("rows") is None else f"{source['rows']:,} rows"


def _problem(one: Any) -> Check:
    if not isinstance(one, dict):
        return Check("data", "FAIL", str(one))
    return Check(
        str(one.get("what", "data")), "FAIL", str(one.get("found", "")), "",
        str(one.get("remedy", "")), int(one.get("exit_code", MISSING)),
    )  # fmt: skip


def _functions(plan: Plan) -> list[Check]:
    """The judge of the verdict and the functions of the reward, where there are any."""
    item = next((item for item in plan.steps if item.stage.evaluates and not item.done), None)
    if item is None:
        return []
    config = item.resolved.config
    keep, judge = config.data.keep_columns, config.step3.eval.judge
    checks = []
    if judge:
        checks.append(_imported(item, "step3.eval.judge", judge, {"judge": judge, "keep": keep}))
    for term in config.step3.rewards:
        if term.use != MODEL:
            what = {"terms": [term.model_dump()], "keep": keep}
            checks.append(_imported(item, "step3.rewards", term.use, what))
    return checks


def _imported(item: StepPlan, setting: str, name: str, what: dict[str, Any]) -> Check:
    answer, trouble = _ask(item, ["rlhf.rewards", json.dumps(what)], JUDGE_SECONDS)
    if answer is None:
        return Check(setting, "FAIL", f"{name!r} could not be imported: {trouble}")
    if answer["problem"]:
        return Check(setting, "FAIL", answer["problem"], exit_code=answer["exit_code"])
    return Check(setting, "ok", f"{name} can be imported and called")


def _ask(
    item: StepPlan, command: Sequence[str], seconds: float, *, offline: bool = False
) -> tuple[dict[str, Any] | None, str]:
    """(the module's answer, "") or (None, why there is none)."""
    env = {name: os.environ[name] for name in os.environ if name not in item.spec.unset}
    env |= {name: value for name, value in item.spec.env.items() if name != "GLIBC_TUNABLES"}
    if offline:
        env["HF_HUB_OFFLINE"] = "1"
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=item.spec.cwd, env=env, capture_output=True,
            text=True, timeout=seconds, check=False,
        )  # fmt: skip
        return dict(json.loads(done.stdout)), ""
    except subprocess.TimeoutExpired:
        return None, f"no answer within {seconds:g} s"
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return None, last
