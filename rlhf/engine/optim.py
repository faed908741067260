"""Optimiser and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import get_scheduler

from rlhf.config.schema import OptimConfig

_NO_DECAY = ("bias", "norm", "ln_", "layernorm")


def param_groups(
    model: torch.nn.Module, optim: OptimConfig, head_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters by what differs: weight decay (not on biases and norms) and the head.

    Every trainable parameter is in exactly one group.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_head = head_learning_rate is not None and ".score." in f".{name}"
        rate = head_learning_rate if is_head and head_learning_rate else optim.learning_rate
        plain = any(word in name.lower() for word in _NO_DECAY)
        groups.setdefault((rate, 0.0 if plain else optim.weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def build_optimizer(
    groups: Iterable[dict[str, Any]], optim: OptimConfig, *, offload: str = "none"
) -> torch.optim.Optimizer:
    """AdamW: torch's fused kernel, or DeepSpeed's CPU kernel where the state is offloaded."""
    common = {"lr": optim.learning_rate, "betas": optim.betas, "eps": optim.eps}
    if offload != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(list(groups), adamw_mode=True, **common)
    return torch.optim.AdamW(list(groups), fused=True, **common)  # type: ignore[arg-type]


def build_scheduler(
    optimizer: torch.optim.Optimizer, optim: OptimConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule over `total_steps` optimiser steps; `warmup` below 1 is a share of them."""
    warmup = optim.warmup * total_steps if optim.warmup < 1 else optim.warmup
    return get_scheduler(
        optim.scheduler,
        optimizer,
        num_warmup_steps=round(warmup),
        num_training_steps=max(1, total_steps),
    )
