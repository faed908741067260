"""Bytes that one DeepSpeed engine holds on one rank, as rlhf/engine/config.py sets it up.

Read in DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, engine.py) and measured
(benchmarks/plan.py). Where it differs from the textbook's 2 + 2 + 12 bytes per parameter:

- stages 1 and 2 keep an fp32 master copy also of fp32 weights;
- in bfloat16 gradients are accumulated in fp32;
- a reduction copies the gradients of a bucket once more; on a GPU stages 1 and 2 also set aside two
  whole buckets of 5e8 elements (not stage 1 in bfloat16), on a CPU only touched pages count;
- stage 3 leaves up to 1e9 gathered parameters in place, and its gradient shard stays.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rlhf.config.schema import EngineConfig

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
REDUCE_BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Parts:
    """Bytes by what they are for, on the device; `host` is beside it, in RAM (0 on a CPU)."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    kv_cache: float = 0.0
    communication: float = 0.0
    framework: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the device."""
        return sum(self.named().values())

    def named(self) -> dict[str, float]:
        """The device's parts by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "host"}

    def __add__(self, other: Parts) -> Parts:
        both = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Parts(**both)

    def on_host(self) -> Parts:
        """The same bytes, all of them in RAM."""
        return Parts(host=self.total + self.host)


@dataclass(frozen=True)
class EngineBytes:
    """What an engine holds at its different moments, each on top of `resident`."""

    resident: Parts
    """As long as the engine lives."""
    forward: Parts
    """In a forward: gathered weights."""
    backward: Parts
    """Gradients and buffers while a backward runs."""
    reduce: Parts
    """When the gradients are averaged; activations are gone."""
    step: Parts
    """In the optimiser's step."""
    whole: Parts
    """For generation: weights gathered all at once."""


def effective_stage(engine: EngineConfig, dtype: str, trains: bool = True) -> int:
    """As rlhf/engine/config.py hands it to DeepSpeed (a test compares)."""
    if not trains:
        return 3 if engine.zero_stage == 3 else 0
    return 1 if engine.zero_stage == 0 and dtype != "float32" else engine.zero_stage


def engine_bytes(
    engine: EngineConfig,
    *,
    dtype: str,
    world: int,
    total: int,
    trained: int,
    largest: int,
    on_cpu: bool,
    hidden: int = 1024,
) -> EngineBytes:
    """Args:
    total, trained: parameters of the whole model, and those with gradients (0: a frozen role).
    largest: elements of the largest parameter.
    on_cpu: the device is the CPU: only touched memory counts, and offloading moves nothing.
    """
    stage = effective_stage(engine, dtype, trains=trained > 0)
    size, tuned = SIZES[dtype], _tuned(engine)
    whole = size * float(total)
    if stage == 3:
        made = _stage_3(size, world, total, trained, largest, hidden, tuned)
    elif trained == 0:
        made = _frozen(whole)
    elif stage == 0:
        made = _stage_0(size, trained, whole, largest)
    else:
        made = _stage_1_or_2(stage, engine, dtype, world, trained, whole, on_cpu, tuned)
    if engine.offload != "none" and stage and not on_cpu:
        made = _offloaded(made, engine, stage, size, world, total, trained, largest)
    return made


def _frozen(whole: float) -> EngineBytes:
    nothing = Parts()
    return EngineBytes(Parts(weights=whole), nothing, nothing, nothing, nothing, nothing)


def _stage_0(size: int, trained: int, whole: float, largest: int) -> EngineBytes:
    gradients = Parts(gradients=size * float(trained))
    bucket = size * float(min(trained, REDUCE_BUCKET + largest))
    return EngineBytes(
        resident=Parts(weights=whole, optimizer=8.0 * trained),
        forward=Parts(),
        backward=gradients,
        reduce=gradients + Parts(communication=bucket),
        step=gradients,
        whole=Parts(),
    )


def _stage_1_or_2(
    stage: int,
    engine: EngineConfig,
    dtype: str,
    world: int,
    trained: int,
    whole: float,
    on_cpu: bool,
    tuned: dict[str, int],
) -> EngineBytes:
    size, share = SIZES[dtype], trained / world
    accumulated = 2 if dtype == "float16" else 4
    resident = Parts(weights=whole, optimizer=12.0 * share)
    in_bucket = accumulated if stage == 1 else size
    bucket = float(tuned["reduce_bucket_size"])
    copied = in_bucket * min(float(trained), bucket)
    buffers = 0.0
    # Stage 1 in bfloat16 is another optimiser of DeepSpeed's, without buckets (engine.py,
    # _do_optimizer_sanity_check), unless its state is offloaded.
    plain = stage == 1 and dtype == "bfloat16" and engine.offload == "none"
    if engine.contiguous_gradients and not plain:
        buffers = in_bucket * bucket * (2 if engine.overlap_comm else 1)
    if stage == 1:
        gradients = Parts(gradients=accumulated * float(trained))
        if accumulated != size:  # the fp32 accumulators stay between the steps
            resident, gradients = resident + gradients, Parts()
        if on_cpu:
            buffers = 0.0  # the gradients themselves move into the buffer
    else:
        gradients = Parts(gradients=accumulated * share)
        if on_cpu:
            buffers = min(buffers, copied)
    on_device = Parts(communication=0.0 if on_cpu else buffers)
    return EngineBytes(
        resident=resident,
        forward=Parts(),
        backward=gradients + on_device,
        reduce=gradients + Parts(communication=buffers + copied),
        step=gradients + Parts(gradients=4.0 * share) + on_device,
        whole=Parts(),
    )


def _stage_3(
    size: int,
    world: int,
    total: int,
    trained: int,
    largest: int,
    hidden: int,
    tuned: dict[str, int],
) -> EngineBytes:
    share = trained / world
    live = size * float(min(total, tuned["stage3_max_live_parameters"])) if world > 1 else 0.0
    gathered = Parts(communication=live)
    bucket = Parts(communication=size * float(2 * hidden * hidden), gradients=size * float(largest))
    resident = Parts(weights=size * total / world, optimizer=12.0 * share, gradients=4.0 * share)
    return EngineBytes(
        resident=resident,
        forward=gathered,
        backward=bucket if trained else Parts(),
        reduce=gathered + (bucket if trained else Parts()),
        step=Parts(gradients=4.0 * min(share, float(tuned["sub_group_size"]))),
        whole=Parts(communication=size * float(total) if world > 1 else 0.0),
    )


def _offloaded(
    made: EngineBytes,
    engine: EngineConfig,
    stage: int,
    size: int,
    world: int,
    total: int,
    trained: int,
    largest: int,
) -> EngineBytes:
    """Optimiser state, its gradients and, at stage 3, the shards of the weights go to RAM (or to
    NVMe, whose staging buffers are not counted)."""
    resident, share = made.resident, trained / world
    moved = resident.optimizer + (4.0 * share if trained else 0.0) + size * share
    weights = resident.weights
    if stage == 3:
        moved, weights = moved + resident.weights, 0.0
    if engine.offload == "nvme":
        moved = 0.0
    buffer = Parts(gradients=size * float(largest)) if trained else Parts()
    drop = lambda parts: replace(parts, gradients=0.0) + buffer
    return EngineBytes(
        resident=Parts(weights=weights, host=moved),
        forward=made.forward,
        backward=drop(made.backward),
        reduce=drop(made.reduce),
        step=buffer,
        whole=made.whole,
    )


def _tuned(engine: EngineConfig) -> dict[str, int]:
    """DeepSpeed's sizes, where the user's own JSON has others."""
    sizes = {
        "reduce_bucket_size": REDUCE_BUCKET,
        "stage3_max_live_parameters": MAX_LIVE,
        "sub_group_size": SUB_GROUP,
    }
    if not engine.deepspeed_config:
        return sizes
    try:
        content: Any = json.loads(Path(engine.deepspeed_config).read_text(encoding="utf-8"))
        zero = content.get("zero_optimization", {})
    except (OSError, ValueError, AttributeError):
        return sizes  # the step itself refuses the file, with the reason
    given = {name: zero.get(name) for name in sizes}
    return sizes | {name: int(v) for name, v in given.items() if isinstance(v, (int, float))}
