"""From scores of whole answers to rewards of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algo.kl import kl_estimate
from rlhf.algo.masking import last_counted, require_shape


def normalize_and_clip_scores(
    scores: Tensor, mean: float = 0.0, std: float = 1.0, clip: float = 5.0
) -> Tensor:
    """(score - mean) / std, clipped to +-clip (10, 23): (B,) -> (B,) float32.

    Raises ValueError unless std > 0 and clip > 0: a reward model with one score for everything
    has nothing to teach.
    """
    if not (std > 0 and clip > 0):
        raise ValueError(
            f"score std {std}, clip {clip}: both must be above 0; "
            "with std 0 the reward model gives every answer one score, so train it again"
        )
    return ((scores.float() - mean) / std).clamp(-clip, clip)


def missing_eos(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Scores minus `penalty` where the answer did not end (17): (B,), (B,) bool -> (B,) float32.

    Apply it after `normalize_and_clip_scores`: the penalty is then in standard deviations, and
    bites even at the lower clip. It still comes before the KL term (23).
    """
    return scores.float() - penalty * (~ended).float()


def token_rewards(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    kl_coef: float,
) -> Tensor:
    """-kl_coef * k1 on each counted token, plus the score on the last counted one (21-23).

    k1 = log_probs - ref_log_probs, and no other estimator: a policy gradient with k1 as the reward
    is that of the KL of whole answers, while k2 and k3 there point elsewhere (22).

    Shapes: scores (B,), log_probs, ref_log_probs and mask (B, A) -> (B, A) float32, 0 where the
    mask is False. A row without a counted token has no reward. With kl_coef 0 only the scores
    remain. Raises ValueError for shapes that do not fit.
    """
    require_shape(mask.shape, log_probs=log_probs, ref_log_probs=ref_log_probs)
    require_shape(mask.shape[:1], scores=scores)
    penalty = -kl_coef * kl_estimate(log_probs, ref_log_probs, "k1")
    at_end = torch.where(last_counted(mask), scores.float().unsqueeze(-1), 0.0)
    return torch.where(mask, penalty, 0.0) + at_end
