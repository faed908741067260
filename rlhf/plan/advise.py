"""Does a step fit, and if not, which change makes it fit at the least cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from rlhf.config.resolve import accumulation, rows_per_step
from rlhf.config.schema import RunConfig
from rlhf.config.trees import at
from rlhf.plan.engines import effective_stage
from rlhf.plan.hardware import Speeds
from rlhf.plan.memory import StepMemory, step_memory
from rlhf.plan.roles import Ranks, Shapes, dtype_of
from rlhf.plan.time import StepTime, step_time
from rlhf.stages import Stage

HEADROOM = 0.9  # of a device's memory may be planned: fragments, and the plan's own error
MOST_CHANGES = 5
GATHER, BY_LAYERS = "step3.rollout.gather", "the policy gathered layer by layer"
# What a change costs: nothing but time; other rounding; another way to train.
TIME_ONLY, ROUNDING, METHOD = 0, 1, 2


@dataclass(frozen=True)
class Machine:
    """Ranks, how fast they are, and the memory of each; None: not known."""

    ranks: Ranks
    speeds: Speeds
    memory: float | None = None
    host_memory: float | None = None
    """RAM beside the device, per rank."""


@dataclass(frozen=True)
class Change:
    """Settings that together are one change, e.g. `actor ZeRO 3`."""

    kind: str
    words: str
    values: Mapping[str, Any] = field(default_factory=dict)
    cost: int = TIME_ONLY


def as_it_runs(config: RunConfig, stage: Stage, shapes: Shapes, machine: Machine) -> RunConfig:
    """`rollout.gather: auto` as the step decides it: whole where that fits, else layer by layer."""
    if not stage.generates or config.step3.rollout.gather != "auto":
        return config
    layers = list(_layer_by_layer(config, stage))
    if not layers or fits(step_memory(config, stage, shapes, machine.ranks), machine):
        return config
    return apply(config, layers)


def fits(memory: StepMemory, machine: Machine) -> bool:
    """True too where the machine's memory is not known."""
    device = machine.memory is None or memory.peak <= HEADROOM * machine.memory
    host = machine.host_memory is None or memory.host <= HEADROOM * machine.host_memory
    return device and host


def advise(
    config: RunConfig, stage: Stage, shapes: Shapes, machine: Machine
) -> tuple[Change, ...] | None:
    """The changes that make a step fit; None where none of ours do.

    Changes that cost only time come before those that change rounding (bfloat16), and these before
    those that train another way (adapters). Then the fewest, then those with the least time.
    """
    options = list(possible(config, stage, machine))
    for cost in (TIME_ONLY, ROUNDING, METHOD):
        allowed = [change for change in options if change.cost <= cost]
        # Offloading is the strongest for the GPU and the worst for the RAM: with and without it.
        spared = [change for change in allowed if "offload" not in change.words]
        if not any(
            _fits_with(config, stage, shapes, machine, _strongest(some))
            for some in (allowed, spared)
        ):
            continue
        for count in range(1, MOST_CHANGES + 1):
            fitting = [
                changes
                for changes in _sets(allowed, count)
                if _fits_with(config, stage, shapes, machine, changes)
            ]
            if fitting:
                return min(fitting, key=lambda c: _seconds(config, stage, shapes, machine, c))
    return None


def fastest(
    config: RunConfig, stage: Stage, shapes: Shapes, machine: Machine
) -> tuple[Change, ...] | None:
    """Of all sets of changes that cost only time, the one that fits with the least of it; else
    as `advise`."""
    allowed = [c for c in possible(config, stage, machine) if c.cost == TIME_ONLY]
    fitting = [
        changes
        for count in range(MOST_CHANGES + 1)
        for changes in _sets(allowed, count)
        if _fits_with(config, stage, shapes, machine, changes)
    ]
    if not fitting:
        return advise(config, stage, shapes, machine)
    return min(fitting, key=lambda c: (_seconds(config, stage, shapes, machine, c), len(c)))


def most_sparing(config: RunConfig, stage: Stage, machine: Machine) -> tuple[Change, ...]:
    """All that could be changed to save memory, each kind at its strongest."""
    return _strongest(list(possible(config, stage, machine)))


def apply(config: RunConfig, changes: Iterable[Change]) -> RunConfig:
    """A copy with the changes' settings; they are our own, so they are not checked again."""
    for change in changes:
        for key, value in change.values.items():
            config = _changed(config, key.split("."), value)
    return config


def _changed(section: Any, path: Sequence[str], value: Any) -> Any:
    if len(path) > 1:
        value = _changed(getattr(section, path[0]), path[1:], value)
    return section.model_copy(update={path[0]: value})


def possible(config: RunConfig, stage: Stage, machine: Machine) -> Iterator[Change]:
    """Single changes that save memory; at most one of each kind is used."""
    world, on_cpu = machine.ranks.world, machine.ranks.on_cpu
    yield from _smaller_batches(config, stage, world)
    yield from _layer_by_layer(config, stage)
    for change in _more_zero(config, stage, world, on_cpu):
        yield change
        if _shards_policy(change) and _can_go_by_layers(config, stage):
            yield _by_layers_too(change)
    models = _models(config, stage)
    plain = [name for name, model in models.items() if not model.gradient_checkpointing]
    if plain:
        yield Change("checkpointing", "gradient checkpointing",
                     {f"{name}.gradient_checkpointing": True for name in plain})  # fmt: skip
    if not on_cpu:
        for zero in (2, 3):
            values: dict[str, Any] = {}
            for name, engine in _engines(config, stage).items():
                if engine.offload == "none":
                    values[f"{name}.zero_stage"] = max(zero, engine.zero_stage)
                    values[f"{name}.offload"] = "cpu"
            if zero == 3 and stage.generates:
                values["step3.reference_engine.zero_stage"] = 3
                values["step3.reference_engine.offload"] = "cpu"
            if values:
                change = Change("zero", f"ZeRO {zero} with optimiser offload to RAM", values)
                yield change
                if _shards_policy(change) and _can_go_by_layers(config, stage):
                    yield _by_layers_too(change)
    wide = [name for name, model in models.items() if dtype_of(model, on_cpu) == "float32"]
    if wide:
        yield Change("dtype", "bfloat16", {f"{name}.dtype": "bfloat16" for name in wide}, ROUNDING)
    whole = [name for name, model in models.items() if not model.lora.rank]
    if whole:
        yield Change("lora", "LoRA r=16", {f"{n}.lora.rank": 16 for n in whole}, METHOD)


def _smaller_batches(config: RunConfig, stage: Stage, world: int) -> Iterator[Change]:
    # A micro-batch is never larger than a rank's share of an optimiser step.
    rows, size = rows_per_step(config, stage), int(at(config, stage.micro_batch))
    size = min(size, max(rows // world, 1))
    while size > 1:
        size //= 2
        values = {stage.micro_batch: size}
        if not stage.generates:
            values[f"{stage.section}.train.eval_batch_size"] = size
        passes = accumulation(apply(config, [Change("", "", values)]), stage, world)
        words = f"micro-batch {size} with accumulation {passes}"
        yield Change("micro", words, values)
    rollout = config.step3.rollout
    rows = min(rollout.batch_size, max(rollout.prompts * rollout.samples_per_prompt // world, 1))
    while stage.generates and rows > max(8, config.step3.rollout.samples_per_prompt):
        rows //= 2
        yield Change("rollout", f"{rows} rows generated at once",
                     {"step3.rollout.batch_size": rows})  # fmt: skip


def _more_zero(config: RunConfig, stage: Stage, world: int, on_cpu: bool) -> Iterator[Change]:
    if world == 1:
        return
    engines = _engines(config, stage)
    running = {
        name: effective_stage(engine, dtype_of(model, on_cpu))
        for (name, engine), model in zip(
            engines.items(), _models(config, stage).values(), strict=True
        )
    }
    for zero in (1, 2, 3):
        lower = {name: engine for name, engine in engines.items() if running[name] < zero}
        values: dict[str, Any] = {f"{name}.zero_stage": zero for name in lower}
        if lower and not stage.generates:
            yield Change("zero", f"ZeRO {zero}", values)
        if not lower or not stage.generates:
            continue
        if "step3.actor.engine" in lower:
            yield Change("zero", f"actor ZeRO {zero}", {"step3.actor.engine.zero_stage": zero})
        yield Change("zero", f"actor and critic ZeRO {zero}", values)
    if stage.generates and config.step3.reference_engine.zero_stage != 3:
        values = {f"{name}.zero_stage": 3 for name in engines}
        values["step3.reference_engine.zero_stage"] = 3
        yield Change("zero", "ZeRO 3 for all four models", values)
        yield Change("reference", "reference and reward model ZeRO 3",
                     {"step3.reference_engine.zero_stage": 3})  # fmt: skip


def _can_go_by_layers(config: RunConfig, stage: Stage) -> bool:
    rollout = config.step3.rollout
    return stage.generates and rollout.engine == "continuous" and rollout.gather != "never"


def _layer_by_layer(config: RunConfig, stage: Stage) -> Iterator[Change]:
    if _can_go_by_layers(config, stage) and config.step3.actor.engine.zero_stage == 3:
        yield Change("gather", BY_LAYERS, {GATHER: "never"})


def _shards_policy(change: Change) -> bool:
    return change.values.get("step3.actor.engine.zero_stage") == 3


def _by_layers_too(change: Change) -> Change:
    return Change(change.kind, f"{change.words}, {BY_LAYERS}", {**change.values, GATHER: "never"})


def _models(config: RunConfig, stage: Stage) -> dict[str, Any]:
    return {f"{place}.model": at(config, place).model for place in stage.models}


def _engines(config: RunConfig, stage: Stage) -> dict[str, Any]:
    return {f"{place}.engine": at(config, place).engine for place in stage.models}


def _sets(options: Sequence[Change], count: int) -> Iterator[tuple[Change, ...]]:
    """Sets of `count` changes, no two of one kind."""
    for changes in combinations(options, count):
        if len({change.kind for change in changes}) == count:
            yield changes


def _strongest(options: Sequence[Change]) -> tuple[Change, ...]:
    """The last of each kind: those that save most."""
    return tuple({change.kind: change for change in options}.values())


def _fits_with(
    config: RunConfig, stage: Stage, shapes: Shapes, machine: Machine, changes: Sequence[Change]
) -> bool:
    return fits(step_memory(apply(config, changes), stage, shapes, machine.ranks), machine)


def _seconds(
    config: RunConfig, stage: Stage, shapes: Shapes, machine: Machine, changes: Sequence[Change]
) -> float:
    return time_with(config, stage, shapes, machine, changes).seconds


def time_with(
    config: RunConfig,
    stage: Stage,
    shapes: Shapes,
    machine: Machine,
    changes: Sequence[Change] = (),
) -> StepTime:
    return step_time(apply(config, changes), stage, shapes, machine.ranks, machine.speeds)
