"""Choosing the next token, and its log-prob under the distribution that the update computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Wider vocabularies are searched in two levels: one pass of sums over blocks of this many
# tokens, then one block. A running sum over 50 000 fp32 numbers is slower and rounds more.
BLOCK = 256
_BELOW_ONE = 1.0 - 1e-12


def choose(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sample one token a row.

    Args:
        logits: (B, V), any float dtype; computed on in fp32.
        uniform: (B,) float64 in [0, 1); it alone decides, so the same number gives the same token.
        temperature: logits are divided by it; <= 0 takes the likeliest token.
        top_k: sample among the k likeliest; <= 0 for all.
        top_p: sample within the smallest set of likeliest tokens that reaches this mass.

    Returns:
        tokens (B,) int64 and log_probs (B,) fp32: log-softmax of logits / temperature (of the
        logits themselves when greedy) over the whole vocabulary, whatever the filters
        (ALGORITHM.md 14, 15).
    """
    scaled = logits.float()
    if temperature > 0 and temperature != 1.0:
        scaled = scaled / temperature
    top = scaled.amax(dim=-1, keepdim=True)
    weights = (scaled - top).exp_()
    if temperature <= 0:
        tokens = scaled.argmax(dim=-1)
        mass = weights.sum(dim=-1)
    elif 0 < top_k < logits.shape[-1] or top_p < 1.0:
        kept, ids = _filtered(scaled, top_k, top_p)
        tokens = ids.gather(1, draw(kept, uniform)[0][:, None]).squeeze(1)
        mass = weights.sum(dim=-1)
    else:
        tokens, mass = draw(weights, uniform)
    # The log-softmax of one token, without one of the whole vocabulary.
    picked = (scaled.gather(1, tokens[:, None]) - top).squeeze(1)
    return tokens, picked - mass.log().float()


def draw(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (B,) distributed as `weights` (B, K >= 0, not normalised), by inverse CDF; and the
    rows' sums (B,) float64."""
    rows, width = weights.shape
    if width <= 2 * BLOCK:
        index, _, total = _invert(weights.double(), uniform)
        return index, total
    blocks = F.pad(weights, (0, -width % BLOCK)).view(rows, -1, BLOCK)
    block, inside, total = _invert(blocks.sum(dim=-1).double(), uniform)
    chosen = blocks[torch.arange(rows, device=weights.device), block]
    return block * BLOCK + _invert(chosen.double(), inside)[0], total


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index (B,) where the running sum passes uniform * total, how far into it (B,) in [0, 1],
    and the total (B,).

    The target stays below the total, so an index of weight 0 is never returned.
    """
    running = weights.cumsum(dim=-1)
    target = uniform.clamp(0.0, _BELOW_ONE)[:, None] * running[:, -1:]
    index = torch.searchsorted(running, target, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    inside = 1.0 - (running.gather(1, index) - target) / weight
    return index.squeeze(1), inside.squeeze(1), running[:, -1]


def _filtered(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Weights and token ids (B, K), likeliest first; top_k comes before top_p, as in
    transformers' logits processors."""
    if 0 < top_k < logits.shape[-1]:
        values, ids = logits.topk(top_k, dim=-1)
    else:
        values, ids = logits.sort(dim=-1, descending=True)
    weights = values.softmax(dim=-1)
    if top_p < 1.0:
        before = weights.cumsum(dim=-1) - weights
        # The first token stays even where rounding makes top_p unreachable.
        drop = before >= top_p
        drop[:, 0] = False
        weights = weights.masked_fill(drop, 0.0)
    return weights, ids
