"""The one list of checks before a start: for `--dry-run`, for `doctor`, and for the run itself.

What a step will need later is asked here, now. All of it is asked, also where something failed: a
person mends everything at once. docs/checks.md has the list as a table; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launch import preflight
from launch.checks import Check, State, of_error, problem
from launch.finished import check_finished
from launch.hostcheck import loopback_reduce, on_hosts
from launch.hub import check_hub
from launch.looking import Looked, look
from launch.memory import memory_check
from launch.model_checks import check_models
from launch.plan import Plan
from rlhf.errors import UserError
from rlhf.evaluation.reward_model import PASSES, judge_reward_model
from rlhf.stages import REWARD, Stage
from rlhf.store import MANIFEST, read_manifest

Way = Literal["dry-run", "doctor", "run"]


@dataclass
class Asking:
    """What the checks look at, and what they find out for those after them."""

    plan: Plan
    way: Way
    offline: bool = False
    """The hub is out of reach and not needed."""
    lacking: bool = False
    """Something cannot be had from the hub: its clients would try for minutes."""
    looked: Looked = field(default_factory=Looked)

    @property
    def stages(self) -> list[Stage]:
        """Those to run."""
        return [item.stage for item in self.plan.steps if not item.done]


@dataclass(frozen=True)
class Item:
    """One entry of the list; `ask` returns a line for each thing that it looked at."""

    name: str
    ask: Callable[[Asking], list[Check]]
    always: bool = False
    """Also where all steps are done already."""


@dataclass(frozen=True)
class Found:
    checks: list[Check]
    looked: Looked
    env: dict[str, str]
    """Variables to add for every step."""

    @property
    def error(self) -> UserError | None:
        return problem(self.checks)


def ask_all(plan: Plan, way: Way) -> Found:
    """Goes through the list; never raises for what it finds."""
    asking = Asking(plan, way)
    checks: list[Check] = []
    for item in CHECKS:
        if asking.stages or item.always:
            try:
                checks += item.ask(asking)
            except UserError as error:
                checks.append(of_error(item.name, error))
    return Found(checks, asking.looked, {"HF_HUB_OFFLINE": "1"} if asking.offline else {})


def _holds(what: str, call: Callable[[], None]) -> list[Check]:
    try:
        call()
    except UserError as error:
        return [of_error(what, error)]
    return [Check(what, "ok", "as needed")]


def _packages(asking: Asking) -> list[Check]:
    plan, models = asking.plan, preflight.needed_models(asking.plan)
    return _holds("packages", lambda: preflight.check_packages(plan.config, asking.stages, models))


def _trackers(asking: Asking) -> list[Check]:
    return _holds("trackers", lambda: preflight.check_trackers(asking.plan.config))


def _commands(asking: Asking) -> list[Check]:
    return _holds("commands", lambda: preflight.check_commands(asking.plan.placement))


def _compiler(asking: Asking) -> list[Check]:
    plan = asking.plan
    return _holds("compiler", lambda: preflight.check_compiler(plan.config, asking.stages))


def _disk(asking: Asking) -> list[Check]:
    plan = asking.plan
    artifacts, whole = preflight.planned_artifacts(plan), preflight.planned_disk(plan)
    return [preflight.disk_check(plan.run.path, artifacts, whole)]


def _models(asking: Asking) -> list[Check]:
    return check_models(asking.plan)


def _hub(asking: Asking) -> list[Check]:
    plan, models = asking.plan, preflight.needed_models(asking.plan)
    hub = plan.config.hub
    asking.offline, checks = check_hub(models, plan.config.data.path, hub.endpoint, hub.offline)
    asking.lacking = any(check.state == "FAIL" for check in checks)
    return checks


def _data(asking: Asking) -> list[Check]:
    """Only a run downloads: it would have to anyway."""
    download = asking.way == "run" and not asking.offline and not asking.lacking
    asking.looked = look(asking.plan, download=download)
    return asking.looked.data


def _functions(asking: Asking) -> list[Check]:
    return asking.looked.functions


def _reward_model(asking: Asking) -> list[Check]:
    """One that is there already; step 2 says it of its own when it ends."""
    checks = []
    for item in asking.plan.steps:
        for parent in item.parents:
            if item.done or parent.name != REWARD.makes or parent.here:
                continue
            ours = (Path(parent.path) / MANIFEST).is_file()
            judged = judge_reward_model(read_manifest(parent.path).metrics if ours else {})
            state: State = "ok" if judged.outcome == PASSES else "warn"
            found = f"{judged.outcome}: {judged.reason}"
            checks.append(Check("reward model", state, found, "", judged.remedy))
    return checks


def _finished(asking: Asking) -> list[Check]:
    return check_finished(asking.plan, asking.looked.sources)


def _memory(asking: Asking) -> list[Check]:
    plan, checks = asking.plan, []
    for item in plan.steps:
        if item.done or (plan.machine.memory is None and _asks_hosts(asking)):
            continue
        if item.needs is None:
            checks.append(
                Check(f"memory for {item.stage}", "warn", f"not planned: {item.not_planned}")
            )
        else:
            refuse = plan.config.launch.check_memory
            checks.append(memory_check(item.needs, plan.machine, refuse))
    return checks


def _asks_hosts(asking: Asking) -> bool:
    full = asking.way == "doctor" or asking.plan.config.launch.preflight == "full"
    return asking.way != "dry-run" and full and asking.plan.placement.over_ssh


def _hosts(asking: Asking) -> list[Check]:
    """A dry run starts nothing anywhere."""
    placement = asking.plan.placement
    if _asks_hosts(asking):
        return on_hosts(asking.plan)
    if placement.over_ssh:
        found = f"{len(placement.hosts)} host(s) were not asked"
        return [Check("hosts", "warn", found, "", "`python train.py doctor` asks them")]
    return [loopback_reduce(placement)] if asking.way == "doctor" else []


CHECKS: tuple[Item, ...] = (
    Item("packages", _packages),
    Item("trackers", _trackers),
    Item("commands", _commands),
    Item("compiler", _compiler),
    Item("models", _models),
    Item("hub", _hub),
    Item("data", _data, always=True),
    Item("judge and rewards", _functions),
    Item("reward model", _reward_model),
    Item("finished steps", _finished, always=True),
    Item("disk", _disk),
    Item("memory", _memory),
    Item("hosts", _hosts),
)
