"""The numbers of step 3's algorithms."""

from __future__ import annotations

from typing import Literal

from rlhf.config.base import Fraction, NonNegative, Positive, Section, doc


class PPOConfig(Section):
    kl_coef: float = doc(
        0.05, "Weight of the KL to the reference (first value if adaptive); 0: none.", ge=0
    )
    kl_in: Literal["reward", "loss"] | None = doc(
        None,
        "Where kl_coef applies: `reward` (k1 on each token: the optimum is "
        "reference * exp(score / kl_coef)), or `loss` (each token's own KL); "
        "unset: loss for grpo, else reward.",
    )
    kl_loss: Literal["k2", "k3"] = doc(
        "k2",
        "KL estimator as a loss: `k2` has the gradient of a token's own KL, `k3` is what GRPO's "
        "paper has.",
    )
    kl_target: float | None = doc(None, "Nats per answer; set: kl_coef adapts to it.", gt=0)
    kl_horizon: float = doc(10_000.0, "Answers over which the coefficient adapts.", gt=0)
    kl_loss_coef: float | None = doc(
        None,
        "Weight of the KL loss, if another than kl_coef; with KL in the reward, a KL loss beside "
        "it. Unset: kl_coef where KL is a loss, else none; 0: no KL loss.",
        ge=0,
    )
    gamma: Fraction = doc(1.0, "Discount per token.")
    lam: Fraction = doc(0.95, "GAE lambda.")
    clip: float = doc(0.2, "Policy ratio clip.", gt=0)
    value_clip: float = doc(0.2, "Value clip around the rollout's values.", gt=0)
    score_clip: float = doc(5.0, "Scores are clipped to +- this, before the KL term.", gt=0)
    normalize_score: bool = doc(True, "Score - mean / std with the reward artifact's statistics.")
    missing_eos_penalty: float = doc(1.0, "Taken from the score of an answer without EOS.", ge=0)
    whiten_advantages: bool = doc(True, "Mean 0, std 1 over the global batch.")
    group_std: bool = doc(True, "GRPO divides by the group's standard deviation.")
    old_log_probs: Literal["auto", "rollout", "forward"] = doc(
        "auto",
        "Where the ratio's old log-probs come from: captured by the rollout, or a forward of the "
        "actor (also where the rollout captures none); `auto`: rollout in float32, else forward.",
    )
    epochs: Positive = doc(2, "PPO epochs over each rollout.")
    minibatches: Positive = doc(1, "Optimiser steps per PPO epoch.")
    target_kl: float | None = doc(None, "Stop the PPO epochs when approx_kl passes this.", gt=0)
    max_kl: float = doc(
        3.0,
        "Nats per token: a policy this far from the reference has diverged; the step rolls back.",
        gt=0,
    )
    entropy_coef: float = doc(0.0, "Weight of the entropy bonus.", ge=0)
    critic_warmup: NonNegative = doc(0, "First iterations that train only the critic.")
    ptx_coef: float = doc(0.0, "Weight of the SFT loss mixed into the update.", ge=0)
    ema_decay: float | None = doc(None, "Keep an average of the actor with this decay.", gt=0, lt=1)
