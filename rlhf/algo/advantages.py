"""Advantages: GAE, discounted returns, whitening, and the baselines of group methods."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.algo.masking import AllReduce, masked_moments, require_shape

EPS = 1e-8
GROUP_EPS = 1e-6


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (25, 26; Schulman et al., arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = sum_k (gamma lam)^k delta_{t+k};  R_t = A_t + V_t.

    Shapes: all (B, A) -> advantages and returns (B, A) float32, not whitened, 0 where the mask is
    False. V_t is the value before token t; the value after the last counted token is 0. Positions
    that do not count are skipped as if they were absent, at the end and in between alike.
    """
    require_shape(mask.shape, rewards=rewards, values=values)
    order = _counted_first(mask)
    reward = torch.where(mask, rewards.float(), 0.0).gather(1, order)
    value = torch.where(mask, values.float(), 0.0).gather(1, order)
    delta = reward + gamma * F.pad(value, (0, 1))[:, 1:] - value
    ahead = discounted_sums(delta, gamma * lam)
    advantages = torch.zeros_like(ahead).scatter(1, order, ahead)
    return advantages, torch.where(mask, advantages + values.float(), 0.0)


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """R_t = sum_k gamma^k r_{t+k} over counted tokens: (B, A) -> (B, A) float32, 0 elsewhere."""
    require_shape(mask.shape, rewards=rewards)
    order = _counted_first(mask)
    ahead = discounted_sums(torch.where(mask, rewards.float(), 0.0).gather(1, order), gamma)
    returns = torch.zeros_like(ahead).scatter(1, order, ahead)
    return torch.where(mask, returns, 0.0)


def discounted_sums(x: Tensor, discount: float) -> Tensor:
    """y[:, t] = sum over s >= t of discount^(s - t) x[:, s]: (B, A) -> (B, A) float32.

    log2(A) vector steps instead of a loop over tokens: after step m, y[:, t] holds the terms of
    the next 2^m positions, and what is 2^m further on holds the 2^m after them.
    """
    total = x.float()
    shift = 1
    while shift < total.shape[-1] and discount**shift > 0:
        total = total + discount**shift * F.pad(total[..., shift:], (0, shift))
        shift *= 2
    return total


def whiten(x: Tensor, mask: Tensor, all_reduce: AllReduce | None = None) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) with moments of all counted values of all ranks (27).

    Shapes: (B, A) -> (B, A) float32, 0 where the mask is False. One value, equal values or none
    give 0. `all_reduce` sums a tensor over ranks; every rank must call, with rows or without.
    """
    _, mean, var = masked_moments(x, mask, all_reduce)
    return torch.where(mask, (x.double() - mean) * (var + EPS).rsqrt(), 0.0).float()


def group_advantages(
    scores: Tensor, group_size: int, use_std: bool = True, valid: Tensor | None = None
) -> Tensor:
    """(score - group mean) / (group std + 1e-6) (37; GRPO, arXiv 2402.03300).

    Shapes: scores (B,) -> (B,) float32. Rows k n ... k n + n - 1 answer one prompt, n = group_size.
    The std is the unbiased one; `use_std=False` leaves it out (Dr. GRPO, arXiv 2503.20783). Rows
    where `valid` (B,) bool is False belong to no group and get 0, as does a group of one.
    Raises ValueError if B is not a multiple of n.
    """
    deviation, size = _group_deviations(scores, group_size, valid)
    if use_std:
        var = deviation.square().sum(1, keepdim=True) / (size - 1).clamp(min=1)
        deviation = deviation / (var.sqrt() + GROUP_EPS)
    return deviation.flatten().float()


def leave_one_out(scores: Tensor, group_size: int, valid: Tensor | None = None) -> Tensor:
    """Score minus the mean of the group's other scores (37; RLOO, arXiv 2402.14740).

    Shapes and `valid` as in `group_advantages`. A group of one gets 0.
    """
    deviation, size = _group_deviations(scores, group_size, valid)
    # s - (S - s) / (n - 1) = (s - S / n) * n / (n - 1)
    return (deviation * size / (size - 1).clamp(min=1)).flatten().float()


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, all_reduce: AllReduce | None = None
) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over counted tokens of all ranks.

    Shapes: all (B, A) -> float32 scalar: 1 perfect, 0 no better than a constant. Where the returns
    do not vary there is nothing to explain: 0.
    """
    require_shape(mask.shape, values=values, returns=returns)
    _, _, residual = masked_moments(returns.double() - values.double(), mask, all_reduce)
    _, _, total = masked_moments(returns, mask, all_reduce)
    return torch.where(total > 0, 1 - residual / total.clamp(min=1e-30), 0.0).float()


def _counted_first(mask: Tensor) -> Tensor:
    """(B, A) column order that moves counted positions to the front and keeps their order."""
    return torch.argsort((~mask).to(torch.int8), dim=1, stable=True)


def _group_deviations(
    scores: Tensor, group_size: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(G, n) deviations from the mean of the valid scores, (G, 1) numbers of these; float64."""
    if group_size < 1 or scores.shape[0] % group_size:
        raise ValueError(
            f"{scores.shape[0]} scores do not divide into groups of {group_size}: keep all answers "
            "to one prompt together, on one rank"
        )
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    require_shape(scores.shape, valid=valid)
    counted = valid.view(-1, group_size)
    # float64 makes the mean of equal scores exact, so that their deviations are 0.
    wide = torch.where(counted, scores.double().view(-1, group_size), 0.0)
    size = counted.sum(1, keepdim=True)
    mean = wide.sum(1, keepdim=True) / size.clamp(min=1)
    return torch.where(counted, wide - mean, 0.0), size
