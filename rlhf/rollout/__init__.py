"""Rollout engines: how the policy answers prompts, behind DeepSpeed's RolloutEngine interface."""

from __future__ import annotations

import difflib
from typing import Any

from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig

from rlhf.errors import ConfigError
from rlhf.rollout.base import Rollouts
from rlhf.rollout.continuous import ContinuousRollout
from rlhf.rollout.gathering import Gathering, gathering
from rlhf.rollout.generation import Generation
from rlhf.rollout.hybrid import HybridRollout
from rlhf.rollout.vllm import VLLMRollout

ROLLOUTS: dict[str, type[Rollouts]] = {
    "continuous": ContinuousRollout,
    "hybrid": HybridRollout,
    "vllm": VLLMRollout,
}

__all__ = [
    "ROLLOUTS",
    "ContinuousRollout",
    "Gathering",
    "Generation",
    "HybridRollout",
    "RolloutRequest",
    "Rollouts",
    "SamplingConfig",
    "VLLMRollout",
    "build_rollout",
    "gathering",
]


def build_rollout(
    name: str, engine: Any, tokenizer: Any, *, batch_size: int, **options: Any
) -> Rollouts:
    """The rollout engine called `name` in ROLLOUTS; see Rollouts for what it takes.

    Raises:
        ConfigError: no such engine, or a batch size below 1.
        RequirementError: the tokenizer lacks pad or EOS, or they are the same; vllm is missing.
    """
    if name not in ROLLOUTS:
        close = difflib.get_close_matches(name, ROLLOUTS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "choose one of " + ", ".join(ROLLOUTS)
        raise ConfigError(f"rollout engine {name!r} does not exist: {hint}")
    return ROLLOUTS[name](engine, tokenizer, batch_size=batch_size, **options)
