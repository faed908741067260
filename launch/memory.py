"""The planner (rlhf/plan) applied to this machine: its memory, a run's models, what is printed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from launch.checks import Check, judge
from launch.devices import cpu_cores, place, visible_gpus
from launch.spec import Placement
from rlhf.config.schema import LaunchConfig, ResolvedStep
from rlhf.config.trees import at
from rlhf.errors import UserError
from rlhf.plan import report
from rlhf.plan.advise import Machine
from rlhf.plan.hardware import CPU_CORE, Speeds, gpu_speeds
from rlhf.plan.memory import CPU_IMPORTS
from rlhf.plan.read import read_shape
from rlhf.plan.roles import Ranks, Shapes

# Processes that keep what they free took up to 2.02 times the plan: docs/scaling.md.
ROOM_TO_KEEP = 2.5
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MEMINFO = Path("/proc/meminfo")


def this_machine(config: LaunchConfig) -> tuple[Machine, int]:
    """(this machine as a step's processes find it, their number). Raises as `place`."""
    placement = place(config)
    return machine_of(placement, config), placement.world_size


def machine_of(placement: Placement, config: LaunchConfig) -> Machine:
    """Ranks and their memory; None where they run on other machines than this one: a login box has
    other RAM than the cluster, and says nothing about it."""
    per_node = placement.per_node
    if elsewhere(placement):
        on_cpu = placement.accelerator == "cpu"
        one = cpu_machine(placement.world_size, per_node, config.threads) if on_cpu else None
        speeds = one.speeds if one else gpu_speeds("a100-80g")
        return Machine(Ranks(placement.world_size, on_cpu, per_node), speeds)
    if placement.accelerator == "cpu":
        return cpu_machine(placement.world_size, per_node, config.threads)
    ram = node_memory()
    beside = ram / per_node if ram else None
    ranks = Ranks(placement.world_size, False, per_node)
    return Machine(ranks, gpu_speeds("a100-80g"), gpu_memory(), beside)


def elsewhere(placement: Placement) -> bool:
    """Do processes run on machines that this one knows nothing about?"""
    return placement.config.launcher == "slurm" or (placement.multi_node and not placement.by_hand)


def cpu_machine(world: int, per_node: int, threads: int | None = None) -> Machine:
    """CPU ranks that share this machine's RAM and cores."""
    cores = threads or max(cpu_cores() // per_node, 1)
    speeds = Speeds(CPU_CORE.flops * cores, CPU_CORE.memory, CPU_CORE.inside, CPU_CORE.between)
    ram = node_memory()
    memory = max(ram / per_node - CPU_IMPORTS, 1.0) if ram else None
    return Machine(Ranks(world, True, per_node), speeds, memory)


def node_memory() -> float | None:
    """Bytes of RAM that processes here may use in all: the machine's, or its cgroup's limit."""
    found = []
    with contextlib.suppress(OSError, IndexError, ValueError):  # not Linux: not known
        words = MEMINFO.read_text().split("MemTotal:")[1].split()
        found.append(float(words[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # no such file, or `max`: no limit
        found.append(float(CGROUP_LIMIT.read_text()))
    return min(found) if found else None


def gpu_memory(environ: Mapping[str, str] | None = None) -> float | None:
    """Bytes of the smallest GPU to be used; None: there is none, or nvidia-smi does not say."""
    names = visible_gpus(os.environ if environ is None else environ)
    tool = shutil.which("nvidia-smi")
    if not names or tool is None:
        return None
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if all(name.isdigit() for name in names):
        query.append(f"--id={','.join(names)}")
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
        return min(float(line) for line in answer.stdout.split()) * 1024**2
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


def step_report(
    resolved: ResolvedStep, machine: Machine, bases: Mapping[str, str | None]
) -> tuple[report.StepReport | None, str]:
    """(what a step needs, ""), or (None, why that cannot be said).

    `bases`: the models that this run's `sft` and `reward` artifacts are made from, as long as they
    are not there to be read themselves.
    """
    try:
        parents = {kind: _readable(resolved.parents.get(kind), bases) for kind in bases}
        stage = resolved.row
        own = {stage.makes: at(resolved.config, stage.base)} if stage.base else {}
        actor = own.get("sft") or parents["sft"] or bases["sft"] or "tiny:llama"
        reward = own.get("reward") or parents["reward"] or bases["reward"] or actor
        shapes = Shapes(read_shape(actor), read_shape(reward))
        return report.plan_step(resolved.config, stage, shapes, machine), ""
    except UserError as error:
        return None, str(error)


def keeps_memory(
    setting: bool | Literal["auto"], found: report.StepReport | None, machine: Machine
) -> bool:
    """launch.keep_memory for a step; where nothing is known about its memory, `auto` is false."""
    if setting != "auto":
        return setting
    if found is None or machine.memory is None:
        return False
    return ROOM_TO_KEEP * found.memory.peak <= machine.memory


def _readable(parent: str | None, bases: Mapping[str, str | None]) -> str | None:
    """A parent that has a configuration by now, or that is a name."""
    if parent is None:
        return None
    there = Path(parent)
    return parent if not there.is_absolute() or (there / "config.json").is_file() else None


def describe(found: report.StepReport | None, why_not: str, machine: Machine) -> list[str]:
    """Lines of the plan."""
    if found is None:
        return [f"memory not planned: {why_not}"]
    return report.lines(found, machine)


def memory_check(
    found: report.StepReport, machine: Machine, refuse: bool, where: str = ""
) -> Check:
    """Does a step fit? It fails where it is sure not to, if `refuse` (launch.check_memory)."""
    what = f"{where}memory for {found.stage}"
    if machine.memory is None:
        needed = f"{report.size(found.memory.peak)} per process"
        return Check(
            what, "warn", "what the machines have is not known here", needed,
            "`python train.py doctor` asks hosts that ssh reaches; else look yourself",
        )  # fmt: skip
    if found.memory.peak <= machine.memory and found.fits:
        return Check(
            what, "ok",
            f"{report.size(found.memory.peak)} of {report.size(machine.memory)} per process",
        )  # fmt: skip
    sure = report.hopeless(found, machine)
    return judge(
        what,
        False,
        "; ".join(report.lines(found, machine)).removeprefix("memory "),
        "",
        "to try nevertheless: launch.check_memory=false" if sure and refuse else "",
        fatal=sure and refuse,
    )
