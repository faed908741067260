"""The models of step 3 and their engines: four, or fewer without a reward model or a critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlhf import models
from rlhf.config.schema import ModelConfig, RLConfig
from rlhf.engine.train import FrozenEngine, TrainEngine
from rlhf.errors import ConfigError
from rlhf.families import FAMILIES


@dataclass(frozen=True)
class Roles:
    """Policy, its frozen start, judge of answers (None: functions alone reward), and value model
    (None: the algorithm needs none).

    All read prompt + answer, with dropout 0 (ALGORITHM.md 12, 18).
    """

    actor: TrainEngine
    reference: FrozenEngine
    reward: FrozenEngine | None
    critic: TrainEngine | None
    actor_dtype: str


def load_roles(
    settings: RLConfig,
    tokenizer: Any,
    *,
    sft: str,
    reward: str | None,
    actor_steps: int,
    critic_steps: int,
    needs_critic: bool,
    say: Any,
) -> Roles:
    """Reads all models and builds their engines. Collective."""
    common: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
    }
    if settings.rollout.hybrid_kernels and not torch.cuda.is_available():
        raise ConfigError(
            "step3.rollout.hybrid_kernels needs a GPU, and there is none here: leave it out"
        )
    actor, frozen = settings.actor, settings.reference_engine
    dtype = models.choose_dtype(actor.model.dtype)
    policy = models.load_causal(
        sft, actor.model, engine=actor.engine, dtype=dtype, dropout=False, **common
    )
    rollout = settings.rollout
    longest = (rollout.max_prompt_length or 0) + rollout.max_new_tokens
    models.check_positions(policy, longest)
    if rollout.hybrid_kernels:
        _check_family(policy)
    critic_dtype = models.choose_dtype(settings.critic.model.dtype)
    reference: Any
    judge: Any
    value: Any
    if reward is None and settings.share_base is True:
        raise ConfigError(
            "step3.share_base true is not possible: no term of step3.rewards is the reward model, "
            "whose adapters are kept on the shared base. Set it to auto or false"
        )
    if reward is not None and _shares(settings, sft, reward, needs_critic, say):
        lora = settings.critic.model.lora if needs_critic else None
        policy, reference, judge, value = models.share(policy, reward, lora)
    else:
        reference = frozen_policy(settings, sft, tokenizer)
        judge = frozen_reward(settings, reward, tokenizer) if reward is not None else None
        value = _critic(settings, sft, reward, critic_dtype, common) if needs_critic else None
    if judge is not None:
        models.check_positions(judge, longest)
    say(f"actor: {models.describe(policy, dtype)}")
    # Frozen engines first: they put a shared base into evaluation mode.
    reference_engine = FrozenEngine(reference, frozen, dtype=dtype)
    reward_engine = FrozenEngine(judge, frozen, dtype=critic_dtype) if judge is not None else None
    actor_engine = TrainEngine(
        policy,
        actor.engine,
        actor.optim,
        dtype=dtype,
        total_steps=actor_steps,
        hybrid_max_tokens=longest if rollout.hybrid_kernels else None,
    )
    critic_engine = None
    if value is not None:
        if not settings.ppo.normalize_score:
            value.set_statistics(0.0, 1.0)  # returns are sums of raw scores: so are values
        say(f"critic: {models.describe(value, critic_dtype)}")
        role = settings.critic
        critic_engine = TrainEngine(
            value, role.engine, role.optim, dtype=critic_dtype, total_steps=critic_steps
        )
    return Roles(actor_engine, reference_engine, reward_engine, critic_engine, dtype)


def frozen_policy(settings: RLConfig, place: str, tokenizer: Any) -> models.CausalModel:
    """A policy that only answers and is compared with: the reference, or a published one."""
    return models.load_causal(
        place,
        _bare(settings.actor.model),
        engine=settings.reference_engine,
        dtype=models.choose_dtype(settings.actor.model.dtype),
        dropout=False,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
    )


def frozen_reward(settings: RLConfig, place: str, tokenizer: Any) -> models.ScalarModel:
    """The reward model."""
    return models.load_scalar(
        place,
        _bare(settings.critic.model),
        engine=settings.reference_engine,
        dtype=models.choose_dtype(settings.critic.model.dtype),
        new_head=False,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
    )


def _check_family(policy: Any) -> None:
    """Raises ConfigError: DeepSpeed's inference kernels are not for this model."""
    kind = policy.config.model_type
    if kind not in FAMILIES or not FAMILIES[kind].hybrid_kernels:
        raise ConfigError(
            f"step3.rollout.hybrid_kernels: DeepSpeed's inference kernels fail for the family "
            f"{kind!r} (docs/gpu.md): leave it out"
        )


def _shares(settings: RLConfig, sft: str, reward: str, needs_critic: bool, say: Any) -> bool:
    """Whether the four models share one base; raises ConfigError where they must and cannot."""
    if settings.share_base is False or (
        settings.share_base == "auto" and not settings.actor.model.lora.rank
    ):
        return False
    reason = models.why_not_shared(settings, sft, reward, needs_critic=needs_critic)
    if reason and settings.share_base is True:
        raise ConfigError(
            f"step3.share_base true is not possible: {reason}. Change that, or set "
            "step3.share_base to auto or false: four models of their own."
        )
    say(f"four models of their own: {reason}" if reason else "one frozen base for all four models")
    return not reason


def _critic(
    settings: RLConfig, sft: str, reward: str | None, dtype: str, common: dict[str, Any]
) -> Any:
    """Starts from the reward model (34), on the scale of its scores; without one from the SFT model
    with a new head, on the scale of the rewards."""
    role = settings.critic
    place = role.model.name or reward
    return models.load_scalar(
        place or sft,
        role.model,
        engine=role.engine,
        dtype=dtype,
        new_head=place is None,
        **common,
    )


def _bare(settings: ModelConfig) -> ModelConfig:
    """The same model without adapters and without what only training needs."""
    plain = settings.model_copy(deep=True)
    plain.lora.rank = 0
    plain.gradient_checkpointing = False
    return plain
