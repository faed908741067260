"""Sums and moments over counted positions, and the slices that turn states into answer tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Returns the sum of its argument over all ranks; may work in place."""


def require_shape(shape: torch.Size, **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor has `shape`: broadcasting would hide a mix-up."""
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the mask has {tuple(shape)}: "
                "they must be equal"
            )


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask`; both of one shape. Returns a float32 scalar, 0 if nothing counts."""
    require_shape(mask.shape, x=x)
    return torch.where(mask, x.float(), 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask`; both of one shape. A float32 scalar, 0 if nothing counts."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_moments(
    x: Tensor, mask: Tensor, all_reduce: AllReduce | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and biased variance of the counted values over all ranks (27).

    `x` and `mask` have one shape. Returns three float64 scalars; all 0 if nothing counts anywhere.
    `all_reduce` is called exactly twice, whatever the mask, so that ranks stay in step.
    """
    require_shape(mask.shape, x=x)
    # float64, and deviations from the mean in a second pass: equal values must have variance 0,
    # and the result must not depend on how rows are spread over ranks.
    wide = torch.where(mask, x.double(), 0.0)
    totals = torch.stack([mask.sum().double(), wide.sum()])
    if all_reduce is not None:
        totals = all_reduce(totals)
    count, total = totals.unbind()
    mean = total / count.clamp(min=1)
    squares = torch.where(mask, wide - mean, 0.0).square().sum()
    if all_reduce is not None:
        squares = all_reduce(squares)
    return count, mean, squares / count.clamp(min=1)


def last_counted(mask: Tensor) -> Tensor:
    """(B, A) bool, True at each row's last counted position only; no True in an empty row."""
    to_the_end = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (to_the_end == 1)


def score_at_end(values: Tensor, mask: Tensor) -> Tensor:
    """The value at each row's last counted position (6): (B, T), (B, T) -> (B,) float32.

    A row without a counted position gets 0. Differentiable in `values`.
    """
    require_shape(mask.shape, values=values)
    return torch.where(last_counted(mask), values.float(), 0.0).sum(-1)


def states_before_answer(x: Tensor, prompt_length: int) -> Tensor:
    """The positions that predict the answer's tokens (25): (B, T, ...) -> (B, T - P, ...).

    Column t is the state before answer token t: columns P-1 ... T-2, for hidden states (whose
    logits give the token's probability) and for values alike. Prompts are left-padded to `P =
    prompt_length`. Raises ValueError if there is no state before the first answer token.
    """
    if not 1 <= prompt_length <= x.shape[1]:
        raise ValueError(
            f"prompt_length {prompt_length}: it must be between 1 and the length {x.shape[1]}"
        )
    return x[:, prompt_length - 1 : -1]
