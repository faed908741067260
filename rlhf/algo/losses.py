"""Losses as SUMS over counted tokens or pairs, each with statistics.

The caller divides by the count over the whole optimiser step and all ranks (30), so that splitting
a batch changes nothing. Statistics are detached float32 scalars: sums, to be added up over
micro-batches and ranks and divided by the count that is named beside them; a name that ends in
`_max` is a maximum. Where nothing counts, everything is 0 and the loss still has its graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.algo.kl import MAX_LOG_RATIO, kl_estimate
from rlhf.algo.masking import last_counted, masked_sum, require_shape, score_at_end

Stats = dict[str, Tensor]


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    importance: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), summed (28; PPO, arXiv 1707.06347, eq. 7).

    Shapes: all (B, A) -> scalar float32. The log-ratio is clamped to +-20 before exp. `importance`
    multiplies each token's loss (sampler / trainer correction) and gets no gradient.

    Stats: `tokens`; sums over tokens `ratio`, `approx_kl` (k3 of old against new: 0 at ratio 1,
    never negative), `clipped` (tokens whose clipped term is the larger); `ratio_max`.
    """
    require_shape(
        mask.shape, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages
    )
    log_ratio = torch.where(mask, log_probs.float() - old_log_probs.float(), 0.0)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    gain = torch.where(mask, advantages.float(), 0.0)
    unclipped, clipped = -gain * ratio, -gain * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(unclipped, clipped)
    if importance is not None:
        require_shape(mask.shape, importance=importance)
        loss = loss * torch.where(mask, importance.detach().float(), 0.0)
    counted_ratio = torch.where(mask, ratio.detach(), 0.0)
    return loss.sum(), {
        "tokens": mask.sum().float(),
        "ratio": counted_ratio.sum(),
        "ratio_max": F.pad(counted_ratio.flatten(), (0, 1)).amax(),  # amax refuses no elements
        "approx_kl": (torch.expm1(log_ratio) - log_ratio).detach().sum(),
        "clipped": (clipped > unclipped).sum().float(),
    }


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Stats]:
    """0.5 max((V - R)^2, (clip(V, V_old +- clip) - R)^2), summed (29).

    Shapes: all (B, A) -> scalar float32. `clip=None`: plain squared error.
    Stats: `tokens`; sums over tokens `value`, `value_clipped` (the clipped term is the larger).
    """
    require_shape(mask.shape, values=values, old_values=old_values, returns=returns)
    value, old, target = (
        torch.where(mask, x.float(), 0.0) for x in (values, old_values.detach(), returns.detach())
    )
    error = (value - target).square()
    near = value if clip is None else old + (value - old).clamp(-clip, clip)
    clipped_error = (near - target).square()
    return 0.5 * torch.maximum(error, clipped_error).sum(), {
        "tokens": mask.sum().float(),
        "value": value.detach().sum(),
        "value_clipped": (clipped_error > error).sum().float(),
    }


def kl_loss(
    log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kind: str = "k2"
) -> tuple[Tensor, Stats]:
    """KL estimate as a loss (22, 37), summed: all (B, A) -> scalar float32. Stats: `tokens`.

    For tokens that the policy sampled, k2's expected gradient is that of each token's own KL,
    sum_a p(a) log(p(a) / q(a)); k3's is that of KL(q || p) there (arXiv 2510.01555). Neither has
    the KL that a token causes in later ones, which k1 in the reward has.

    Raises ValueError for k1: the expectation of its gradient is 0, it would only add noise.
    """
    if kind == "k1":
        raise ValueError("KL estimator 'k1' as a loss has no useful gradient: use 'k2' or 'k3'")
    require_shape(mask.shape, log_probs=log_probs, ref_log_probs=ref_log_probs)
    new = torch.where(mask, log_probs.float(), 0.0)
    reference = torch.where(mask, ref_log_probs.detach().float(), 0.0)
    return kl_estimate(new, reference, kind).sum(), {"tokens": mask.sum().float()}


def cross_entropy_sum(log_probs: Tensor, mask: Tensor) -> tuple[Tensor, Stats]:
    """-log p of the counted tokens, summed: all (B, A) -> scalar float32. Stats: `tokens`.

    The loss of SFT (3) and, mixed into PPO's update, ptx (36).
    """
    return -masked_sum(log_probs, mask), {"tokens": mask.sum().float()}


def sum_of_nll(log_probs: Tensor, entropy: Tensor | None, where: slice) -> Tensor:
    """The same loss as a `TokenLoss` of `logprobs.head_loss`: every token that is given counts."""
    return -log_probs.sum()


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margin: float | Tensor = 0.0, mask: Tensor | None = None
) -> tuple[Tensor, Stats]:
    """-logsigmoid(chosen - rejected - margin), summed over pairs (7; InstructGPT, eq. 1).

    Shapes: scores (P,), margin a number or (P,), mask (P,) bool for padding pairs -> scalar
    float32. Stats: `pairs`; sums over pairs `correct` (chosen strictly above rejected), `margin`
    (chosen - rejected).
    """
    mask = torch.ones_like(chosen, dtype=torch.bool) if mask is None else mask
    require_shape(mask.shape, chosen=chosen, rejected=rejected)
    difference = torch.where(mask, chosen.float() - rejected.float(), 0.0)
    losses = -F.logsigmoid(difference - _per_pair(margin, chosen))
    return masked_sum(losses, mask), _pair_stats(difference, mask)


def token_wise_pairwise_loss(
    values_chosen: Tensor,
    values_rejected: Tensor,
    chosen_ids: Tensor,
    rejected_ids: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    margin: float | Tensor = 0.0,
) -> tuple[Tensor, Stats]:
    """The pairwise loss at each token from the first difference on; mean per pair, summed (7).

    Shapes: all (P, T), margin a number or (P,) -> scalar float32. Both sides of a pair start in
    the same column; masks are True on real tokens (prompt + answer, or the answer alone).

    From the first differing column to the end of the longer side, column t compares the values at
    t. A side that has ended stands by the value at its own last token, never at a pad: so the
    score that is read later, at the last token, is trained on both sides. A pair with no difference
    (two empty rows of padding, say) counts for nothing.
    Stats as in `pairwise_loss`, by the values at the last tokens.
    """
    require_shape(
        chosen_mask.shape,
        values_chosen=values_chosen,
        values_rejected=values_rejected,
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        rejected_mask=rejected_mask,
    )
    either = chosen_mask | rejected_mask
    differs = either & ((chosen_ids != rejected_ids) | (chosen_mask != rejected_mask))
    before_end = either.flip(1).cumsum(1).flip(1) > 0
    span = (differs.cumsum(1) > 0) & before_end
    difference = _held_at_end(values_chosen, chosen_mask) - _held_at_end(
        values_rejected, rejected_mask
    )
    losses = -F.logsigmoid(difference - _per_pair(margin, values_chosen[:, 0]).unsqueeze(1))
    lengths = span.sum(1)
    mean = torch.where(span, losses, 0.0).sum(1) / lengths.clamp(min=1)
    at_end = score_at_end(values_chosen, chosen_mask) - score_at_end(values_rejected, rejected_mask)
    return mean.sum(), _pair_stats(at_end, lengths > 0)


def _held_at_end(values: Tensor, mask: Tensor) -> Tensor:
    """(P, T) float32: the values, with the one at the last counted token in all later columns."""
    after_end = (last_counted(mask).cumsum(1) > 0) & ~mask
    kept = torch.where(mask, values.float(), 0.0)
    return torch.where(after_end, score_at_end(values, mask).unsqueeze(1), kept)


def _per_pair(margin: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(margin, Tensor):
        require_shape(like.shape, margin=margin)
        return margin.float()
    return torch.full_like(like, margin, dtype=torch.float32)


def _pair_stats(difference: Tensor, mask: Tensor) -> Stats:
    return {
        "pairs": mask.sum().float(),
        "correct": (mask & (difference > 0)).sum().float(),
        "margin": masked_sum(difference.detach(), mask),
    }
