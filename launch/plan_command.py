"""`rlhf plan`: does it fit, how long does an iteration take, what should be changed. No network."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.gate import base_models
from launch.memory import this_machine
from launch.options import Options, normalize_flags, parse_options
from rlhf.config.load import with_values
from rlhf.config.resolve import resolve_step
from rlhf.config.schema import RunConfig
from rlhf.config.trees import at
from rlhf.errors import ConfigError
from rlhf.plan import report, scaling
from rlhf.plan.advise import Machine
from rlhf.plan.hardware import GPUS, gpu_speeds, parse_bytes
from rlhf.plan.read import read_shape
from rlhf.plan.roles import Ranks, Shapes
from rlhf.stages import REWARD, Stage

DEFAULT_GPU = "a100-80g"


def parser() -> argparse.ArgumentParser:
    """The planner's own flags; all others are those of train.py."""
    made = argparse.ArgumentParser(
        prog="rlhf plan",
        allow_abbrev=False,
        description="Memory per rank, time per iteration and what to change, from configurations "
        "alone: nothing is loaded or downloaded. Takes all flags and key=value settings of "
        "train.py too. Exit code: 0 everything fits, 1 something does not.",
    )
    add = made.add_argument
    add("--gpus", type=int, metavar="N", help="plan for N GPUs instead of this machine")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    add("--gpu", default=DEFAULT_GPU, metavar="NAME",
        help=f"whose speeds to assume: {', '.join(GPUS)}; default {DEFAULT_GPU}")  # fmt: skip
    add("--gpu-memory", metavar="SIZE", help="e.g. 80GB or 24GiB; default: that GPU's")
    add("--node-memory", metavar="SIZE", help="RAM of a node, for what is offloaded, e.g. 1TB")
    add("--node-bandwidth", metavar="SIZE", default="25GB",
        help="bytes a second of each GPU's link to other nodes; default 25GB")  # fmt: skip
    add("--actor", metavar="MODEL", help="as --actor-model")
    add("--reward", metavar="MODEL", help="as --reward-model")
    add("--json", action="store_true", help="bytes and seconds as JSON")
    add("--scaling", action="store_true",
        help="the tables of docs/scaling.md: OPT and Llama on 1 to 512 GPUs")  # fmt: skip
    return made


def main(argv: Sequence[str]) -> int:
    """Prints the plan; 1 if a step does not fit. Raises ConfigError, RequirementError."""
    flags, options = parse(argv)
    if flags.scaling:
        print(scaling.tables(gpu_speeds(flags.gpu, parse_bytes(flags.node_bandwidth))))
        return 0
    assert options is not None  # only --scaling has none
    if flags.gpus is None:
        machine, world = this_machine(options.config.launch)
    else:
        machine, world = _asked(flags), flags.gpus
    reports, names = plan_reports(options, machine, world)
    if flags.json:
        print(
            json.dumps({"models": names, "steps": [report.as_json(r) for r in reports]}, indent=2)
        )
    else:
        print(_describe(reports, names, machine, flags))
    return 0 if all(r.fits for r in reports) else 1


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Options | None]:
    """Our flags, and what train.py makes of the rest. Raises ConfigError."""
    flags, rest = parser().parse_known_args(normalize_flags(argv))
    if flags.scaling:
        if rest:
            raise ConfigError(f"--scaling takes no settings, {rest[0]!r} was given")
        return flags, None
    for flag, given in (("--actor-model", flags.actor), ("--reward-model", flags.reward)):
        rest += [flag, given] if given else []
    if flags.gpus is not None and (flags.gpus < 1 or flags.gpus_per_node < 1):
        raise ConfigError("--gpus and --gpus-per-node count GPUs: give 1 or more")
    return flags, parse_options(rest)


def plan_reports(
    options: Options, machine: Machine, world: int
) -> tuple[list[report.StepReport], dict[str, str]]:
    """(a report for each step asked for, the models' names)."""
    config = with_values(options.config, base_models(options))
    actor = options.actor_model or config.step1.model.name or "tiny:llama"
    reward = options.reward_model or config.step2.model.name or actor
    shapes = Shapes(read_shape(actor), read_shape(reward))
    run_dir = Path(config.output_dir) / config.name
    reports = []
    for stage in options.stages:
        config = divisible(config, stage, world)
        resolved = resolve_step(config, stage, run_dir=run_dir, world_size=world)
        reports.append(report.plan_step(resolved.config, stage, shapes, machine))
    asked = REWARD in options.stages or config.step3.uses_reward_model
    return reports, {"actor": actor} | ({"reward": reward} if asked else {})


def divisible(config: RunConfig, stage: Stage, world: int) -> RunConfig:
    """Batches raised to a multiple of the ranks: what a run on so many would have to ask for."""
    key = stage.batch
    value = at(config, key)
    if value % world == 0:
        return config
    return with_values(config, {key: -(-value // world) * world})


def _asked(flags: Any) -> Machine:
    speeds = gpu_speeds(flags.gpu, parse_bytes(flags.node_bandwidth))
    memory = parse_bytes(flags.gpu_memory) if flags.gpu_memory else GPUS[flags.gpu.lower()].memory
    per_node = min(flags.gpus, flags.gpus_per_node)
    beside = parse_bytes(flags.node_memory) / per_node if flags.node_memory else None
    return Machine(Ranks(flags.gpus, False, per_node), speeds, memory, beside)


def _describe(
    reports: Sequence[report.StepReport], names: dict[str, str], machine: Machine, flags: Any
) -> str:
    ranks = machine.ranks
    what = "CPU process(es)" if ranks.on_cpu else f"GPU(s), {ranks.per_node} a node"
    speeds = "this machine's cores" if ranks.on_cpu else f"the speeds of {flags.gpu}"
    found = [
        f"plan     {', '.join(f'{role} {name}' for role, name in names.items())}",
        f"machine  {ranks.world} {what}; times assume {speeds} (docs/scaling.md)",
    ]
    for item in reports:
        first, *more = [*report.lines(item, machine), report.time_line(item)]
        found += [f"{item.stage}   {first}", *(f"         {line}" for line in more)]
    return "\n".join(found)
