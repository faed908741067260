"""The four models of step 3 and their engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf import models
from rlhf.config.schema import ModelConfig, RLConfig
from rlhf.engine.train import FrozenEngine, TrainEngine


@dataclass(frozen=True)
class Roles:
    """Policy, its frozen start, judge of answers, and value model (None: the algorithm needs none).

    All read prompt + answer, with dropout 0 (ALGORITHM.md 12, 18).
    """

    actor: TrainEngine
    reference: FrozenEngine
    reward: FrozenEngine
    critic: TrainEngine | None
    actor_dtype: str


def load_roles(
    settings: RLConfig,
    tokenizer: Any,
    *,
    sft: str,
    reward: str,
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
    actor, frozen = settings.actor, settings.reference_engine
    dtype = models.choose_dtype(actor.model.dtype)
    policy = models.load_causal(
        sft, actor.model, engine=actor.engine, dtype=dtype, dropout=False, **common
    )
    longest = (settings.rollout.max_prompt_length or 0) + settings.rollout.max_new_tokens
    rollout = settings.rollout
    longest = (rollout.max_prompt_length or 0) + rollout.max_new_tokens
    models.check_positions(policy, longest)
    say(f"actor: {models.describe(policy, dtype)}")
    actor_engine = TrainEngine(
        policy,
        actor.engine,
        actor.optim,
        dtype=dtype,
        total_steps=actor_steps,
        hybrid_max_tokens=longest if rollout.hybrid_kernels else None,
    )
    reference = FrozenEngine(
        models.load_causal(
            sft, _bare(actor.model), engine=frozen, dtype=dtype, dropout=False, **common
        ),
        frozen,
        dtype=dtype,
    )
    critic_dtype = models.choose_dtype(settings.critic.model.dtype)
    judge = models.load_scalar(
        reward,
        _bare(settings.critic.model),
        engine=frozen,
        dtype=critic_dtype,
        new_head=False,
        **common,
    )
    models.check_positions(judge, longest)
    reward_engine = FrozenEngine(judge, frozen, dtype=critic_dtype)
    critic_engine = None
    if needs_critic:
        critic_engine = _critic(settings, reward, critic_dtype, critic_steps, common, say)
    return Roles(actor_engine, reference, reward_engine, critic_engine, dtype)


def _critic(
    settings: RLConfig, reward: str, dtype: str, steps: int, common: dict[str, Any], say: Any
) -> TrainEngine:
    """Starts from the reward model (34), on the scale of its normalised scores."""
    role = settings.critic
    critic = models.load_scalar(
        role.model.name or reward,
        role.model,
        engine=role.engine,
        dtype=dtype,
        new_head=False,
        **common,
    )
    say(f"critic: {models.describe(critic, dtype)}")
    return TrainEngine(critic, role.engine, role.optim, dtype=dtype, total_steps=steps)


def _bare(settings: ModelConfig) -> ModelConfig:
    """The same model without adapters and without what only training needs."""
    plain = settings.model_copy(deep=True)
    plain.lora.rank = 0
    plain.gradient_checkpointing = False
    return plain
