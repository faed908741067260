"""Rollout engines: how the policy answers prompts, behind DeepSpeed's RolloutEngine interface."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig

from rlhf.errors import ConfigError
from rlhf.rollout.continuous import ContinuousRollout
from rlhf.rollout.gathering import Gathering, gathering
from rlhf.rollout.generation import Generation
from rlhf.rollout.hybrid import HybridRollout
from rlhf.rollout.vllm import VLLMRollout

Rollouts = ContinuousRollout | HybridRollout | VLLMRollout
ROLLOUTS: dict[str, type[ContinuousRollout] | type[HybridRollout] | type[VLLMRollout]] = {
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
    "SamplingConfig",
    "VLLMRollout",
    "build_rollout",
    "gathering",
]


def build_rollout(
    name: str,
    engine: Any,
    tokenizer: Any,
    *,
    batch_size: int,
    stop: Sequence[str] = (),
    seed: int = 0,
    rank: int = 0,
    gather: Callable[[], AbstractContextManager[Any]] = nullcontext,
    lockstep: bool = False,
) -> Rollouts:
    """The rollout engine called `name` in ROLLOUTS.

    Args:
        engine: has `.module`, a causal LM or a wrapper with it as `.model` (hybrid also needs
            `.module.generate`).
        tokenizer: pad and EOS tokens, different; `decode` for stop strings.
        batch_size: rows generated at once.
        stop: strings that end an answer.
        seed, rank: random seed is seed + 100003 * rank.
        gather: makes a context entered once per generate (ZeRO-3 parameter gathering).
        lockstep: all ranks call forward equally often (ZeRO-3 without gather).

    Raises:
        ConfigError: no such engine, or a batch size below 1.
        RequirementError: the tokenizer lacks pad or EOS, or they are the same; vllm is missing.
    """
    if name not in ROLLOUTS:
        close = difflib.get_close_matches(name, ROLLOUTS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "choose one of " + ", ".join(ROLLOUTS)
        raise ConfigError(f"rollout engine {name!r} does not exist: {hint}")
    return ROLLOUTS[name](
        engine,
        tokenizer,
        batch_size=batch_size,
        stop=stop,
        seed=seed,
        rank=rank,
        gather=gather,
        lockstep=lockstep,
    )
