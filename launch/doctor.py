"""`rlhf doctor`, with train.py's flags: every check of this machine and the hosts, a line each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import hub, preflight
from launch.checks import Check, judge
from launch.hostcheck import REDUCE_SECONDS, SPARE_BYTES, last_line, on_hosts, reduce_check
from launch.options import parse_options
from launch.plan import Plan, make_plan
from launch.ports import free_port
from launch.spec import PROJECT_ROOT, Placement
from rlhf.config.names import DEFAULT_ENDPOINT
from rlhf.errors import RequirementError, UserError


def main(argv: Sequence[str]) -> int:
    """Prints all checks; 0 if none failed, else 3."""
    plan = make_plan(parse_options(argv))
    checks = [*here(plan), *hub_checks(plan)]
    checks += on_hosts(plan) if plan.placement.over_ssh else [loopback_reduce(plan.placement)]
    for check in checks:
        print(check.line())
    failed = sum(check.state == "FAIL" for check in checks)
    print(f"{len(checks)} checks, {failed} failed" if failed else f"{len(checks)} checks, all hold")
    return RequirementError.exit_code if failed else 0


def here(plan: Plan) -> list[Check]:
    """What a run asks of this machine before it starts, as lines."""
    config, steps = plan.config, [item.step for item in plan.steps if not item.done]
    models = preflight.needed_models(plan)
    asked: list[tuple[str, Callable[[], object]]] = [
        ("packages", lambda: preflight.check_packages(config, steps, models)),
        ("models and data", lambda: preflight.check_names(models, config.data.path)),
        ("compiler", lambda: preflight.check_compiler(config, steps)),
        ("disk", lambda: preflight.check_disk(plan.run.path, preflight.planned_artifacts(plan), 0)),
        ("commands", lambda: preflight.check_commands(plan.placement)),
    ]
    checks = [_of_call(what, call) for what, call in asked]
    checks.append(disk_check("here", _free(plan.run.path), plan, str(plan.run.path)))
    return checks


def _of_call(what: str, call: Callable[[], object]) -> Check:
    try:
        call()
    except UserError as error:
        return Check(what, "FAIL", str(error))
    return Check(what, "ok", "as needed")


def _free(path: Path) -> int:
    existing = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(existing).free


def disk_check(where: str, free: int, plan: Plan, path: str) -> Check:
    """Room for what the run is planned to write; a short one writes no checkpoints."""
    needed = SPARE_BYTES + preflight.planned_disk(plan)
    return judge(
        f"{where}: free disk for artifacts and checkpoints",
        free >= needed,
        f"{free / 1e9:.1f} GB",
        f"about {needed / 1e9:.1f} GB in {path}",
        preflight.SMALLER,
        fatal=False,
    )


def hub_checks(plan: Plan) -> list[Check]:
    """A line for each model and data set that comes from a hub."""
    ids = hub.needed(preflight.needed_models(plan), plan.config.data.path)
    endpoint = plan.config.hub.endpoint or DEFAULT_ENDPOINT
    checks = []
    for kind, name in ids:
        cached = hub.is_cached(kind, name)
        trouble = "offline" if plan.config.hub.offline else hub.trouble_with(endpoint, kind, name)
        found = f"answers at {endpoint}" if trouble is None else f"{trouble}; cached: {cached}"
        checks.append(
            judge(
                f"hub: {name}",
                trouble is None or cached,
                found,
                "reachable, or downloaded before",
                "--hf-endpoint MIRROR, HF_TOKEN for a gated one, or a local directory",
            )
        )
    return checks


def loopback_reduce(placement: Placement) -> Check:
    """Two ranks on this machine (one, where it has one GPU)."""
    world = 2 if placement.accelerator == "cpu" else min(2, placement.world_size)
    env = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "rlhf.engine.reduce_check", placement.accelerator]
    children = [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    troubles = []
    for rank, child in enumerate(children):
        try:
            _, errors = child.communicate(timeout=REDUCE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            _, errors = child.communicate()
        if child.returncode != 0:
            troubles.append(f"rank {rank}: {last_line(errors)}")
    return reduce_check(troubles, f"{world} ranks meet here")
