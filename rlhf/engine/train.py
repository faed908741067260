"""A DeepSpeed engine that trains, with our own accumulation and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import deepspeed
import torch

from rlhf.config.schema import EngineConfig, OptimConfig
from rlhf.engine import comm
from rlhf.engine.config import deepspeed_config
from rlhf.engine.ops import announce_compile
from rlhf.engine.optim import build_optimizer, build_scheduler, param_groups
from rlhf.engine.zero3 import hidden_size
from rlhf.errors import UserError

T = TypeVar("T")


class TrainEngine:
    """Policy, critic, SFT or reward model under DeepSpeed.

    `step` takes the micro-batches of one optimiser step. Losses are sums divided by a count of the
    *whole* step over all ranks, so that the gradient does not depend on micro-batch size,
    accumulation or number of ranks (ALGORITHM.md 30): DeepSpeed's own division by accumulation
    steps is off and its averaging over ranks is undone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        engine: EngineConfig,
        optim: OptimConfig,
        *,
        dtype: str,
        total_steps: int,
        head_learning_rate: float | None = None,
        hybrid_max_tokens: int | None = None,
    ) -> None:
        config = deepspeed_config(
            engine,
            dtype=dtype,
            trains=True,
            max_grad_norm=optim.max_grad_norm,
            hidden_size=hidden_size(model),
            hybrid_max_tokens=hybrid_max_tokens,
        )
        announce_compile(engine.offload)
        groups = param_groups(model, optim, head_learning_rate)
        optimizer = build_optimizer(groups, optim, offload=engine.offload)
        scheduler = build_scheduler(optimizer, optim, total_steps)
        self.deepspeed, _, _, self.scheduler = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config
        )
        self.config = config
        self.module = self.deepspeed.module
        self.device = self.deepspeed.device
        # `from_pretrained` leaves evaluation mode on: no dropout and no gradient checkpointing.
        self.deepspeed.train()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients."""
        was_training = self.module.training
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.deepspeed.train(was_training)

    def step(self, micro_batches: Sequence[T], loss: Callable[[T], torch.Tensor]) -> float:
        """One optimiser step.

        Args:
            micro_batches: this rank's; every rank must have the same number of them.
            loss: a micro-batch's share of the step's loss, already divided by the global count.

        Returns:
            The gradient norm over all ranks, before clipping.

        Raises:
            UserError: a loss is not finite. (DeepSpeed's norms do not tell: they mask NaN.)
        """
        total = torch.zeros((), device=self.device)
        for index, micro_batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            value = loss(micro_batch) * comm.world_size()
            total += value.detach()
            self.deepspeed.backward(value, scale_wrt_gas=False)
            norm = self._plain_grad_norm() if index == len(micro_batches) - 1 else 0.0
            self.deepspeed.step()
        if not torch.isfinite(total):
            raise UserError(
                f"the training loss is {float(total)}: training has diverged. Lower the learning "
                "rate, warm it up (optim.warmup), clip gradients (optim.max_grad_norm 1), or use "
                "dtype float32."
            )
        reported = self.deepspeed.get_global_grad_norm()
        return float(reported) if reported else norm

    def _plain_grad_norm(self) -> float:
        """Norm at ZeRO-0 in fp32, where DeepSpeed reports none and gradients are whole."""
        if self.deepspeed.zero_optimization():
            return 0.0
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


class FrozenEngine:
    """Reference or reward model: forward only, sharded when ZeRO-3."""

    def __init__(self, model: torch.nn.Module, engine: EngineConfig, *, dtype: str) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        config = deepspeed_config(engine, dtype=dtype, trains=False, hidden_size=hidden_size(model))
        self.deepspeed, *_ = deepspeed.initialize(model=model, config=config)
        self.config = config
        self.module = self.deepspeed.module
        self.device = self.deepspeed.device
        self.deepspeed.eval()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)
