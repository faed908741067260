"""The table of algorithms. Each is a rule that credits tokens; the policy loss is one for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.algo import advantages as adv
from rlhf.algo.masking import AllReduce

Credited = tuple[Tensor, Tensor | None]


class Credit(Protocol):
    """(advantages (B, A), returns (B, A) or None), float32, without gradient, 0 off the mask.

    token_rewards (B, A): from `rewards.token_rewards`: the score, and the KL term if it is in the
    reward; values (B, A) before each token, or None without a critic; mask (B, A) bool;
    rows k n ... k n + n - 1 answer one prompt, n = group_size; `whiten` and `group_std` are the
    user's settings, which a rule may not know; `all_reduce` sums over ranks. Every rank calls.
    Raises ValueError for shapes that do not fit or missing values.
    """

    def __call__(
        self,
        *,
        token_rewards: Tensor,
        values: Tensor | None,
        mask: Tensor,
        group_size: int,
        gamma: float,
        lam: float,
        whiten: bool,
        group_std: bool,
        all_reduce: AllReduce | None = None,
    ) -> Credited: ...


@dataclass(frozen=True)
class Algorithm:
    """An entry of ALGORITHMS.

    needs_critic: `credit` needs values and gives the returns to train them on.
    Where the KL to the reference counts is a setting: `RLConfig.kl_place`.
    """

    name: str
    needs_critic: bool
    credit: Credit


@torch.no_grad()
def _ppo(
    *,
    token_rewards: Tensor,
    values: Tensor | None,
    mask: Tensor,
    gamma: float,
    lam: float,
    whiten: bool,
    all_reduce: AllReduce | None = None,
    **_: Any,
) -> Credited:
    """GAE; returns before whitening (25-27)."""
    if values is None:
        raise ValueError("algorithm 'ppo' needs a critic's values, and there are none")
    advantages, returns = adv.gae(token_rewards, values, mask, gamma, lam)
    return adv.whiten(advantages, mask, all_reduce) if whiten else advantages, returns


@torch.no_grad()
def _grpo(
    *, token_rewards: Tensor, mask: Tensor, group_size: int, group_std: bool, **_: Any
) -> Credited:
    """Every token gets its answer's standing in the group (37). `whiten` does not apply."""
    whole = _whole(token_rewards, mask)
    per_answer = adv.group_advantages(whole, group_size, group_std, valid=mask.any(1))
    return _on_tokens(per_answer, mask), None


@torch.no_grad()
def _rloo(*, token_rewards: Tensor, mask: Tensor, group_size: int, **_: Any) -> Credited:
    """Every token gets its answer's whole reward, KL included, over the others' mean (37)."""
    whole = _whole(token_rewards, mask)
    return _on_tokens(adv.leave_one_out(whole, group_size, valid=mask.any(1)), mask), None


@torch.no_grad()
def _reinforce_pp(
    *,
    token_rewards: Tensor,
    mask: Tensor,
    gamma: float,
    whiten: bool,
    all_reduce: AllReduce | None = None,
    **_: Any,
) -> Credited:
    """Discounted rewards to come, whitened over the global batch (37; arXiv 2501.03262)."""
    advantages = adv.discounted_returns(token_rewards, mask, gamma)
    return adv.whiten(advantages, mask, all_reduce) if whiten else advantages, None


def _whole(token_rewards: Tensor, mask: Tensor) -> Tensor:
    """An answer's reward: (B, A) -> (B,) float32."""
    return torch.where(mask, token_rewards.float(), 0.0).sum(1)


def _on_tokens(per_answer: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, per_answer.unsqueeze(1), 0.0)


ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("ppo", needs_critic=True, credit=_ppo),
        Algorithm("grpo", needs_critic=False, credit=_grpo),
        Algorithm("rloo", needs_critic=False, credit=_rloo),
        Algorithm("reinforce++", needs_critic=False, credit=_reinforce_pp),
    )
}
