"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(average: Iterable[Tensor], current: Iterable[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * current, in place (36).

    Shapes: two equally long sequences of equally shaped tensors. Raises TypeError unless the
    averages are float32 (in bfloat16 steps of 0.8% would be rounded away), ValueError if the
    sequences differ in length or shape, or decay is not in [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"EMA decay {decay}: it must be between 0 and 1")
    for mean, weight in zip(average, current, strict=True):
        if mean.dtype != torch.float32:
            raise TypeError(f"EMA in {mean.dtype}: keep the averages in float32")
        if mean.shape != weight.shape:
            raise ValueError(f"EMA of shape {tuple(mean.shape)}, weight {tuple(weight.shape)}")
        mean.lerp_(weight.to(mean.device, torch.float32), 1 - decay)
