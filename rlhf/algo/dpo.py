"""Direct preference optimisation (ALGORITHM.md 39): a policy's loss on pairs, without a reward
model. Sums over pairs with statistics, as in `rlhf.algo.losses`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.algo.losses import Stats
from rlhf.algo.masking import require_shape

PER_TOKEN = ("ipo", "sigmoid_norm")  # log-probs of an answer count by their mean, not by their sum


def implicit_rewards(log_ratios: Tensor, lengths: Tensor, beta: float, kind: str) -> Tensor:
    """What the policy's log-probs say of each answer's worth: beta log(pi(y|x) / ref(y|x)).

    For the kinds of PER_TOKEN it is a mean over the answer's tokens.

    Args:
        log_ratios: (N,) sums over an answer's tokens of log pi - log ref.
        lengths: (N,) numbers of these tokens.
    """
    if kind in PER_TOKEN:
        log_ratios = log_ratios / lengths.clamp(min=1)
    return beta * log_ratios.float()


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    mask: Tensor,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Stats]:
    """The loss of pairs, summed; `chosen` and `rejected` are `implicit_rewards`.

    `sigmoid`: -(1 - s) logsigmoid(h) - s logsigmoid(-h), with h = chosen - rejected (DPO, arXiv
    2305.18290, eq. 7; s: conservative DPO, for labels of which a share s is wrong).
    `sigmoid_norm`: the same of rewards by token (arXiv 2411.15124, eq. 6). `ipo`: (h / beta -
    1 / (2 beta))^2 of rewards by token (IPO, arXiv 2310.12036, eq. 17).

    Shapes: (P,) each, mask (P,) bool -> scalar float32. Stats: `pairs`; sums over pairs `correct`
    (h > 0, equal ones half), `margin` (h), `chosen_reward`, `rejected_reward`.
    Raises ValueError for another kind.
    """
    require_shape(mask.shape, chosen=chosen, rejected=rejected)
    difference = torch.where(mask, chosen.float() - rejected.float(), 0.0)
    if kind == "ipo":
        losses = (difference / beta - 1 / (2 * beta)).square()
    elif kind in ("sigmoid", "sigmoid_norm"):
        right, wrong = F.logsigmoid(difference), F.logsigmoid(-difference)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    else:
        raise ValueError(f"DPO loss {kind!r}: use sigmoid, sigmoid_norm or ipo")
    h = difference.detach()
    counted = {"chosen_reward": chosen.detach(), "rejected_reward": rejected.detach()}
    return torch.where(mask, losses, 0.0).sum(), {
        "pairs": mask.sum().float(),
        "correct": (((h > 0).float() + 0.5 * (h == 0).float()) * mask).sum(),
        "margin": h.sum(),
        **{name: torch.where(mask, value.float(), 0.0).sum() for name, value in counted.items()},
    }
