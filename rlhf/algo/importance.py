"""When another engine samples than the one that trains: how far apart, and a correction."""

from __future__ import annotations

import torch
from torch import Tensor


def importance_weights(
    log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor, cap: float
) -> Tensor:
    """Truncated importance weights min(p / p_sampler, cap) of each token, without gradient.

    A policy gradient over tokens of another distribution is right on average when each term is
    multiplied by p / p_sampler; the cap bounds the variance at the price of a small bias (E.
    Ionides, "Truncated importance sampling", 2008; F. Yao et al., "Your efficient RL framework
    secretly brings you off-policy RL training", 2025).

    Args:
        log_probs, sampler_log_probs: (N, A), trainer's and sampler's log-probs of the tokens.
        mask: (N, A) bool, True = counts.
        cap: largest weight, >= 1.

    Returns:
        (N, A) fp32; 1 where not counted.

    Raises ValueError for a cap below 1.
    """
    if cap < 1:
        raise ValueError(f"importance cap {cap} must be at least 1: equal engines have weight 1")
    ratio = sampler_gap(log_probs, sampler_log_probs, mask).exp()
    return ratio.clamp(max=cap)


def sampler_gap(log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor) -> Tensor:
    """log p - log p_sampler (N, A) fp32, 0 where not counted."""
    gap = log_probs.detach().float() - sampler_log_probs.float()
    return torch.where(mask, gap, 0.0)
