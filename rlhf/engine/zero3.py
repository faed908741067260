"""ZeRO-3: building a model in shards, and seeing whole weights when they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers.integrations import HfDeepSpeedConfig

from rlhf.config.schema import EngineConfig
from rlhf.engine import comm
from rlhf.engine.config import deepspeed_config

_GENERATION = -1  # no module's id; a parameter in use by any module is not sharded


def is_sharded(parameters: Iterable[torch.nn.Parameter]) -> bool:
    return any(hasattr(p, "ds_id") for p in parameters)


@contextmanager
def sharded_loading(engine: EngineConfig, *, dtype: str) -> Iterator[None]:
    """Within, transformers' `from_pretrained` shards weights as it reads them, if ZeRO-3."""
    if engine.zero_stage != 3:
        yield
        return
    config = deepspeed_config(engine, dtype=dtype, trains=False)
    alive = HfDeepSpeedConfig(config)  # transformers keeps a weak reference to it
    try:
        yield
    finally:
        del alive


def gathered(parameters: Iterable[torch.nn.Parameter], modifier_rank: int | None = None) -> Any:
    """Context with whole parameters; `modifier_rank`'s changes are sent to all ranks."""
    parameters = [p for p in parameters if hasattr(p, "ds_id")]
    if not parameters:
        return nullcontext()
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


@contextmanager
def kept_whole(parameters: Iterable[Any]) -> Iterator[None]:
    """Context with whole parameters through any number of forwards (generation).

    In `gathered` alone DeepSpeed's hooks shard each module again after its forward, and every
    later forward is a collective: ranks whose answers differ in length would wait for ever.
    """
    parameters = [p for p in parameters if hasattr(p, "ds_id")]
    with gathered(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(_GENERATION)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(_GENERATION)


def full_size(parameter: torch.nn.Parameter) -> int:
    """Number of elements of the whole parameter, sharded or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def local_tensor(parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's storage of a parameter: its ZeRO-3 shard, or the whole."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


def share(whole: torch.Tensor, size: int) -> torch.Tensor:
    """This rank's (size,) elements of a tensor that ZeRO-3 shares out evenly, padded with zeros."""
    start = comm.rank() * size
    mine = whole.flatten()[start : start + size]
    return torch.nn.functional.pad(mine, (0, size - mine.numel()))


def drop_gathered(parameters: Iterable[Any]) -> None:
    """Forgets whole copies of sharded parameters: the next use gathers them from the shards.

    DeepSpeed keeps small parameters whole between steps, and would not see a changed shard.
    """
    for parameter in parameters:
        if getattr(parameter, "ds_status", None) == ZeroParamStatus.AVAILABLE:
            parameter.partition()


def hidden_size(model: torch.nn.Module) -> int:
    config = getattr(model, "config", None)
    return int(getattr(config, "hidden_size", 0) or 1024)
