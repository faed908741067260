"""Scores of answers by code: rewards that are trained on, and judges that nobody trains on."""

from rlhf.rewards.asking import Asked, RewardFailed, asked
from rlhf.rewards.functions import ENDED, RewardFunction
from rlhf.rewards.judges import Judge, resolve_judge
from rlhf.rewards.terms import check_terms, offered_columns, resolve_reward

__all__ = [
    "ENDED",
    "Asked",
    "Judge",
    "RewardFailed",
    "RewardFunction",
    "asked",
    "check_terms",
    "offered_columns",
    "resolve_judge",
    "resolve_reward",
]
