"""A DeepSpeed engine that trains, with our own accumulation and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import deepspeed
import torch

from rlhf import stall
from rlhf.config.schema import EngineConfig, OptimConfig
from rlhf.engine import comm
from rlhf.engine.config import deepspeed_config
from rlhf.engine.ops import announce_compile
from rlhf.engine.optim import build_optimizer, build_scheduler, param_groups
from rlhf.engine.zero3 import hidden_size
from rlhf.errors import Diverged

T = TypeVar("T")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
DIVERGED = (
    "training has diverged. Lower the learning rate, warm it up (optim.warmup), clip gradients "
    "(optim.max_grad_norm 1), or use dtype float32"
)


def rows_of(micro_batch: Any) -> dict[str, torch.Tensor]:
    """The tensors of a batch (a dataclass of tensors) by name; {} for anything else."""
    values = vars(micro_batch) if hasattr(micro_batch, "__dict__") else {}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def without_calls(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments of a forward, to repeat it: loss functions have side effects, and are left out."""
    keep = lambda value: None if callable(value) and not isinstance(value, torch.Tensor) else value
    return tuple(map(keep, args)), {name: keep(value) for name, value in kwargs.items()}


def same_bits(call: Callable[[], Any]) -> bool:
    """Does a call give the same tensors twice? It returns one, or a tuple or dict of them."""
    one, two = (_tensors(call()) for _ in range(2))
    return len(one) == len(two) and all(
        a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(one, two, strict=True)
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.detach().reshape(-1)]
    parts = value.values() if isinstance(value, dict) else value
    return [t for part in parts for t in _tensors(part)] if isinstance(value, (tuple, dict)) else []


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
        self._last: Arguments | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stall.mark()
        self._last = without_calls(args, kwargs)
        return self.deepspeed(*args, **kwargs)

    def repeats(self) -> bool:
        """Does the last micro-batch give the same bits, read twice? True before the first."""
        if self._last is None:
            return True
        args, kwargs = self._last
        with self.evaluating():
            return same_bits(lambda: self.deepspeed(*args, **kwargs))

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def hyperparameters(self) -> list[dict[str, Any]]:
        """Of each parameter group: what the settings say of the optimiser (lr, betas, ...)."""
        groups = self.deepspeed.optimizer.param_groups
        return [{k: v for k, v in group.items() if k != "params"} for group in groups]

    def set_hyperparameters(self, wanted: Sequence[dict[str, Any]], scale: float = 1.0) -> None:
        """`hyperparameters` of a new engine, at the present place of the schedule; rates x scale.

        A checkpoint brings its own; this is how changed settings reach a resumed run.
        """
        schedule: Any = self.scheduler  # transformers' schedules are all LambdaLR
        schedule.base_lrs = [values["initial_lr"] * scale for values in wanted]
        groups = self.deepspeed.optimizer.param_groups
        for group, values, rate, factor in zip(
            groups, wanted, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group.update(values, initial_lr=rate, lr=rate * factor(schedule.last_epoch))
        schedule._last_lr = [group["lr"] for group in groups]

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
        # At ZeRO-3: a forward fetches ahead what a backward pass would read, and who saves the
        # model next cannot shard a weight that is still on its way.
        self.deepspeed.empty_partition_cache()

    def step(self, micro_batches: Sequence[T], loss: Callable[[T], torch.Tensor]) -> float:
        """One optimiser step.

        Args:
            micro_batches: this rank's; every rank must have the same number of them.
            loss: a micro-batch's share of the step's loss, already divided by the global count.

        Returns:
            The gradient norm over all ranks, before clipping.

        Raises:
            Diverged: a loss or the gradient is not finite; names the micro-batch.
        """
        # On a shared base the backward pass needs the model's own adapters, too: checkpointed
        # activations are made again there.
        in_use = getattr(self.module, "in_use", nullcontext)
        losses: list[torch.Tensor] = []
        with in_use():
            for index, micro_batch in enumerate(micro_batches):
                self.deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
                value = loss(micro_batch) * comm.world_size()
                losses.append(value.detach())
                self.deepspeed.backward(value, scale_wrt_gas=False)
                norm = self._plain_grad_norm() if index == len(micro_batches) - 1 else 0.0
                self.deepspeed.step()
        finite = torch.isfinite(torch.stack(losses))
        if not bool(finite.all()):
            at = int((~finite).nonzero()[0, 0])
            raise Diverged(
                f"the training loss is {float(losses[at])}: {DIVERGED}", rows_of(micro_batches[at])
            )
        reported = self.deepspeed.get_global_grad_norm()
        norm = float(reported) if reported else norm
        # DeepSpeed's word for a norm that is NaN or infinite is -1; under fp16 it skips that step.
        if not norm >= 0 or norm == float("inf"):
            if self.deepspeed.fp16_enabled():
                return norm
            raise Diverged(f"the gradient is not finite: {DIVERGED}", rows_of(micro_batches[0]))
        return norm

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
        self._last: Arguments | None = None

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stall.mark()
        self._last = without_calls(args, kwargs)
        return self.deepspeed(*args, **kwargs)

    @torch.no_grad()
    def repeats(self) -> bool:
        """Does the last micro-batch give the same bits, read twice? True before the first."""
        if self._last is None:
            return True
        args, kwargs = self._last
        return same_bits(lambda: self.deepspeed(*args, **kwargs))
