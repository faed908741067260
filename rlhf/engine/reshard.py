"""A DeepSpeed checkpoint of another number of ranks or ZeRO stage, read into an engine.

DeepSpeed reads back what the same ranks wrote at the same stage. Its universal checkpoint is a
second copy on the disk, which ZeRO 0 cannot read. Here the ranks' files are mapped into memory,
each parameter's fp32 weight and AdamW moments are put together from their shards, and every rank
takes its share of them: nothing is written, and no more than one parameter is whole at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor

from rlhf.engine import comm
from rlhf.engine.safe_load import load_safely
from rlhf.engine.train import TrainEngine
from rlhf.engine.zero3 import share
from rlhf.errors import ArtifactError

MOMENTS = ("exp_avg", "exp_avg_sq")
# Where four models share one base, which they do not at ZeRO 3, the critic's adapter has a name of
# its own, and its head is not inside peft's model.
_ADAPTER = re.compile(r"\.(lora_\w+)\.\w+(?=\.|$)")
_HEAD = re.compile(r"\.modules_to_save\.\w+")
_IN_PEFT = "model.base_model.model."


@dataclass(frozen=True)
class Piece:
    """Where some elements of a parameter, in their order, lie in a rank's flat tensors."""

    rank: int
    group: int
    start: int
    numel: int


@dataclass
class Shards:
    """One engine's checkpoint, as all ranks wrote it; tensors are whole when they are asked for.

    Args:
        directory: what `save_engine` wrote.
        stage, world: ZeRO stage and number of ranks that wrote it.
        groups: names of the parameters in each of the optimiser's groups, as ZeRO 0 numbers them.

    Raises ArtifactError: files are missing or say something else.
    """

    directory: Path
    stage: int
    world: int
    groups: list[list[str]]
    common: dict[str, Any] = field(init=False)
    """What is the same on all ranks: schedule, counts of steps; below ZeRO 3 the weights."""
    shapes: dict[str, torch.Size] = field(init=False)

    def __post_init__(self) -> None:
        first = "zero_pp_rank_0_mp_rank_00" if self.stage == 3 else "mp_rank_00"
        self.common = self._load(f"{first}_model_states.pt")
        self._module = plain_names(self.common["module"])
        self._ranks: list[dict[str, Any]] = []
        self._pieces: dict[str, list[Piece]] = {}
        if self.stage == 0:
            self._read_whole()
            return
        for rank in range(self.world):
            found = self._load(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            self._ranks.append(found["optimizer_state_dict"])
        shapes: list[dict[str, torch.Size]] = self.common["param_shapes"]
        self.shapes = {n: shape for group in shapes for n, shape in plain_names(group).items()}
        for rank in range(self.world):
            for name, piece in self._of_rank(rank):
                self._pieces.setdefault(name, []).append(piece)
        for name, shape in self.shapes.items():
            found_size = sum(piece.numel for piece in self._pieces.get(name, []))
            if found_size != shape.numel():
                raise self._unfit(f"{name} has {found_size} of {shape.numel()} elements")

    @property
    def steps(self) -> Tensor | None:
        """Updates that the optimiser has made, as its state says; None: none yet."""
        states: Any = self._states if self.stage == 0 else self._flat_states(0)
        for state in states.values():
            return torch.as_tensor(state["step"], dtype=torch.float32).clone()
        if self.common["global_steps"] > self.common["skipped_steps"]:
            raise self._unfit("it has no optimiser state (optimisers on NVMe keep theirs there)")
        return None

    @property
    def scaler(self) -> Any:
        """fp16's loss scaler and its counters; None where there is none."""
        return self._ranks[0].get("loss_scaler") if self._ranks else None

    def weight(self, name: str) -> Tensor:
        """The fp32 master weight, in the parameter's shape."""
        if self.stage == 0:
            return self._module[name].float()
        return self._whole(name, [self._flat_weights(rank) for rank in range(self.world)])

    def moment(self, name: str, kind: str) -> Tensor:
        """AdamW's `kind` of MOMENTS, fp32, in the parameter's shape; zeros where it has none: the
        parameter has had no gradient yet."""
        if self.stage == 0:
            state = self._states.get(name)
            return torch.zeros(self.shapes[name]) if state is None else state[kind]
        flat = [
            {group: state[kind] for group, state in self._flat_states(rank).items()}
            for rank in range(self.world)
        ]
        return self._whole(name, flat)

    def buffer(self, name: str) -> Tensor:
        found: Tensor = self._module[name]
        return found

    def _whole(self, name: str, flat: list[Any]) -> Tensor:
        parts = [flat[p.rank][p.group][p.start : p.start + p.numel] for p in self._pieces[name]]
        return torch.cat(parts).view(self.shapes[name])

    def _flat_weights(self, rank: int) -> Any:
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        return self._ranks[rank][key]

    def _flat_states(self, rank: int) -> dict[int, dict[str, Tensor]]:
        key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        return dict(self._ranks[rank][key]["state"])

    def _of_rank(self, rank: int) -> list[tuple[str, Piece]]:
        """What a rank has of each parameter, by DeepSpeed's own record of it (ZeRO 1 and 2), or
        where ZeRO 3 puts it: one after the other, each in equal shares, the last ones padded."""
        found = []
        if self.stage < 3:
            for group, mapping in enumerate(self._ranks[rank]["param_slice_mappings"]):
                for name, place in plain_names(mapping).items():
                    found.append((name, Piece(rank, group, place.start, place.numel)))
            return found
        for group, shapes in enumerate(self.common["param_shapes"]):
            start = 0
            for name, shape in plain_names(shapes).items():
                share = math.ceil(shape.numel() / self.world)
                left = max(min(share, shape.numel() - rank * share), 0)
                found.append((name, Piece(rank, group, start, left)))
                start += share
        return found

    def _read_whole(self) -> None:
        """ZeRO 0: torch's own optimiser, which numbers parameters group by group."""
        optimizer = self.common["optimizer"]
        sizes = [len(group["params"]) for group in optimizer["param_groups"]]
        if sizes != [len(group) for group in self.groups]:
            raise self._unfit("its parameters were in other groups (weight decay, head's rate)")
        order = [plain_name(name) for group in self.groups for name in group]
        self._states = {order[number]: state for number, state in optimizer["state"].items()}
        self.shapes = {name: self._module[name].shape for name in order}
        for name, state in self._states.items():
            if state[MOMENTS[0]].shape != self.shapes[name]:
                raise self._unfit(f"{name} has the moments of another parameter")

    def _load(self, pattern: str) -> dict[str, Any]:
        found = list((self.directory / "state").glob(pattern))
        if len(found) != 1:
            raise self._unfit(f"{len(found)} files are called {pattern}, there must be one")
        return dict(load_safely(found[0], mmap=True))

    def _unfit(self, why: str) -> ArtifactError:
        return ArtifactError(
            f"{self.directory}: cannot be read for other processes or another ZeRO stage: {why}. "
            "Start with the processes and the stage that it was made with, or start the step "
            "again: --resume never"
        )


def plain_name(name: str) -> str:
    """A parameter's name, whatever the adapter's is and whether models share a base."""
    return _ADAPTER.sub(r".\1", _HEAD.sub("", name)).removeprefix(_IN_PEFT)


def plain_names(values: Mapping[str, Any]) -> dict[str, Any]:
    return {plain_name(name): value for name, value in values.items()}


@torch.no_grad()
def put(engine: TrainEngine, shards: Shards) -> None:
    """The whole state into this engine, whatever its ranks and stage. Collective."""
    named = engine.module.named_parameters()
    trained = {p: plain_name(name) for name, p in named if p.requires_grad}
    shapes = {name: getattr(p, "ds_shape", p.shape) for p, name in trained.items()}
    if shapes != shards.shapes:
        names = sorted(name for name, _ in shapes.items() ^ shards.shapes.items())
        raise shards._unfit(f"{names[0]} is not in both, or has another shape")
    stage = engine.config["zero_optimization"]["stage"]
    {0: _put_whole, 3: _put_sharded}.get(stage, _put_partitioned)(engine, shards, trained)
    buffers = plain_names(dict(engine.module.named_buffers()))
    for name in map(plain_name, shards.common["buffer_names"]):
        buffers[name].copy_(shards.buffer(name))
    outer = engine.deepspeed
    if shards.scaler is not None and hasattr(outer.optimizer, "loss_scaler"):
        outer.optimizer.loss_scaler = shards.scaler
    engine.scheduler.load_state_dict(shards.common["lr_scheduler"])
    for count in ("global_steps", "global_samples", "skipped_steps"):
        setattr(outer, count, shards.common[count])


def _put_whole(engine: TrainEngine, shards: Shards, trained: dict[Any, str]) -> None:
    """ZeRO 0: every rank has all weights and torch's optimiser."""
    steps, optimizer = shards.steps, engine.deepspeed.optimizer
    for parameter, name in trained.items():
        parameter.copy_(shards.weight(name))
        if steps is not None:
            moments = {
                kind: shards.moment(name, kind).to(parameter.device, copy=True) for kind in MOMENTS
            }
            optimizer.state[parameter] = {"step": steps.to(parameter.device, copy=True), **moments}


def _put_partitioned(engine: TrainEngine, shards: Shards, trained: dict[Any, str]) -> None:
    """ZeRO 1 and 2: whole weights in the model's dtype; of master weights and moments a share."""
    steps, zero = shards.steps, engine.deepspeed.optimizer
    if steps is not None:
        for group in zero.optimizer.param_groups:
            (flat,) = group["params"]
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            zero.optimizer.state[flat] = {
                "step": steps_for(zero.optimizer, steps, flat.device),
                **moments,
            }
        zero._lazy_init_hp_params_optimizer_state()  # as before its first step
    for parameter, name in trained.items():
        weight = shards.weight(name)
        parameter.copy_(weight)
        safe_set_full_fp32_param(parameter, weight.to(parameter.device))
        for kind in MOMENTS if steps is not None else ():
            moment = shards.moment(name, kind).to(parameter.device)
            safe_set_full_optimizer_state(parameter, moment, kind)


def _put_sharded(engine: TrainEngine, shards: Shards, trained: dict[Any, str]) -> None:
    """ZeRO 3: DeepSpeed reads this rank's state, made as it would have saved it."""
    steps, zero = shards.steps, engine.deepspeed.optimizer

    def flat(group: list[Any], whole: Any) -> Tensor:
        return torch.cat([share(whole(trained[p]), p.partition_numel()) for p in group])

    zero.checkpoint_event_prologue()
    state = zero.state_dict()
    state["fp32_flat_groups"] = [flat(group, shards.weight) for group in zero.fp16_groups]
    if steps is not None:
        state["optimizer_state_dict"]["state"] = {
            number: {"step": steps_for(zero.optimizer, steps, torch.device("cpu"))}
            | {
                kind: flat(group, lambda name, kind=kind: shards.moment(name, kind))
                for kind in MOMENTS
            }
            for number, group in enumerate(zero.fp16_groups)
        }
    zero.load_state_dict([None] * comm.rank() + [state])
    zero.checkpoint_event_epilogue()


def steps_for(optimizer: torch.optim.Optimizer, steps: Tensor, device: torch.device) -> Any:
    """As torch's AdamW keeps it, or DeepSpeed's CPU kernel."""
    return steps.to(device, copy=True) if isinstance(optimizer, torch.optim.AdamW) else int(steps)
