"""A moving average of a model's trainable weights, shard by shard under ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlhf.algo.ema import ema_update
from rlhf.engine.zero3 import drop_gathered, is_sharded, local_tensor


class WeightEMA:
    """average <- decay * average + (1 - decay) * weight, in fp32, after each optimiser step."""

    def __init__(self, module: Any, decay: float) -> None:
        self.decay = decay
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._names, self._parameters = list(trained), list(trained.values())
        self.averages = [
            local_tensor(p).detach().to(torch.float32, copy=True) for p in self._parameters
        ]

    def update(self) -> None:
        ema_update(self.averages, [local_tensor(p) for p in self._parameters], self.decay)

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weight and average, where every rank has the same ones: not of ZeRO-3's shards."""
        if not is_sharded(self._parameters):
            yield from zip(self._names, self.averages, strict=True)

    def state_dict(self) -> dict[str, Any]:
        """This rank's averages, for an exact resume."""
        return {"averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the averages of `state_dict`."""
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within, the live model holds the averages (to publish it)."""
        kept = [local_tensor(p).detach().clone() for p in self._parameters]
        self._set(self.averages)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: list[torch.Tensor]) -> None:
        drop_gathered(self._parameters)
        for parameter, value in zip(self._parameters, values, strict=True):
            local_tensor(parameter).copy_(value)
