"""Acts 1-4 of an iteration: generate, score, reward, credit. Numbers as in README.md."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.algorithms import Algorithm
from rlhf.algo.importance import importance_weights, sampler_gap
from rlhf.algo.kl import ESTIMATORS, KLController, kl_estimate
from rlhf.algo.rewards import missing_eos, normalize_and_clip_scores, token_rewards
from rlhf.config.ppo import PPOConfig
from rlhf.config.schema import RolloutConfig
from rlhf.data.batches import PromptBatch
from rlhf.data.plan import Budget
from rlhf.engine import comm
from rlhf.engine.memory import peak_since_last
from rlhf.models import last_tokens, last_values
from rlhf.rollout import RolloutRequest, SamplingConfig
from rlhf.stragglers import Stragglers
from step3_ppo.roles import Roles
from step3_ppo.rollout import Rollout


def generate(engine: Any, prompts: PromptBatch, settings: RolloutConfig) -> Rollout:
    """1. Answers to this rank's prompts: (N,) prompts x n samples."""
    request = RolloutRequest(prompts.input_ids, prompts.attention_mask.long())
    sampling = SamplingConfig(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        n_samples_per_prompt=settings.samples_per_prompt,
    )
    return Rollout.of(engine.generate(request, sampling))


def policy_log_probs(engine: Any, rollout: Rollout, temperature: float) -> Tensor:
    """(N, A) fp32 log-probs of the answers' tokens under a causal engine."""
    log_probs, _ = engine(
        rollout.input_ids, rollout.attention_mask, rollout.score_mask, temperature
    )
    return log_probs[:, rollout.prompt_width :]


def answer_values(engine: Any, rollout: Rollout) -> Tensor:
    """(N, A) fp32 values before each answer token: the slice start - 1 : end - 1 (25)."""
    read = torch.nn.functional.pad(rollout.answer_mask, (rollout.prompt_width - 1, 1))
    raw = engine(rollout.input_ids, rollout.attention_mask, read)
    values = engine.module.normalize(raw)
    return values[:, rollout.prompt_width - 1 : -1] * rollout.answer_mask


def answer_scores(engine: Any, rollout: Rollout) -> Tensor:
    """(N,) fp32 raw scores: the reward model's value at the last token that it reads (6, 16)."""
    ids, mask = rollout.read
    return last_values(engine(ids, mask, last_tokens(mask)), mask)


def score(
    roles: Roles,
    rollout: Rollout,
    temperature: float,
    size: int | Budget,
    old_log_probs: str = "auto",
    values: bool = True,
) -> Rollout:
    """2. Reward, reference log-probs, old log-probs and, with `values`, old values; no gradients.

    Old log-probs (`auto`) come from the rollout where it computed them as the update does: in fp32.
    In 16 bits decoding rounds differently from a whole forward: the ratio would not start at 1.
    """
    with torch.no_grad():
        old = rollout.log_probs
        exact = old_log_probs == "rollout" or roles.actor_dtype == "float32"
        if old is None or old_log_probs == "forward" or not exact:
            with roles.actor.evaluating():
                old = rollout.map(lambda r: policy_log_probs(roles.actor, r, temperature), size)
        reference = rollout.map(lambda r: policy_log_probs(roles.reference, r, temperature), size)
        raw = None
        if roles.reward is not None:
            raw = rollout.map(lambda r: answer_scores(roles.reward, r), size)
        old_values = None
        if roles.critic is not None and values:
            critic = roles.critic
            with critic.evaluating():
                old_values = rollout.map(lambda r: answer_values(critic, r), size)
    return replace(rollout, log_probs=old, ref_log_probs=reference, scores=raw, values=old_values)


def reward(
    rollout: Rollout,
    settings: PPOConfig,
    controller: KLController,
    statistics: tuple[float, float] | None,
    *,
    kl_in_reward: bool,
) -> tuple[Rollout, dict[str, float]]:
    """3. Rewards of tokens; with what is worth logging, over all ranks.

    statistics: of the reward model that gave the scores; None: the scores are the reward as it is
    (`Rewarder`), and are neither normalised nor clipped here.
    """
    scores, old = rollout.need("scores"), rollout.need("log_probs")
    reference = rollout.need("ref_log_probs")
    mean, std, clipped = 0.0, 1.0, scores
    if statistics is not None:
        mean, std = statistics if settings.normalize_score else (0.0, 1.0)
        clipped = normalize_and_clip_scores(scores, mean, std, settings.score_clip)
    shaped = missing_eos(clipped, rollout.ended, settings.missing_eos_penalty)
    rewards = token_rewards(
        shaped,
        old,
        reference,
        rollout.answer_mask,
        controller.coef if kl_in_reward else 0.0,
    )
    kl = {
        kind: float((kl_estimate(old, reference, kind) * rollout.answer_mask).sum())
        for kind in ESTIMATORS
    }
    raw = scores.double()
    sums = comm.sum_over_ranks(
        {
            "answers": len(rollout),
            "tokens": float(rollout.answer_mask.sum()),
            "raw": float(raw.sum()),
            "raw_squared": float((raw**2).sum()),
            "normalised": float(((scores - mean) / std).sum()),
            "reward": float(shaped.sum()),
            "read": float(rollout.read[1][:, rollout.prompt_width :].sum()),
            "ended": float(rollout.ended.sum()),
        }
        | kl
    )
    answers, tokens = sums["answers"], max(sums["tokens"], 1.0)
    average = sums["raw"] / answers
    stats = {
        "score_mean": average,
        "score_std": max(sums["raw_squared"] / answers - average**2, 0.0) ** 0.5,
        "score_normalised": sums["normalised"] / answers,
        "reward_mean": sums["reward"] / answers,
        "kl_per_answer": sums["k1"] / answers,
        "kl_per_token": sums["k1"] / tokens,
        "kl_k2": sums["k2"] / tokens,
        "kl_k3": sums["k3"] / tokens,
        "kl_coef": controller.coef,
        "answer_length": sums["read"] / answers,
        "eos_fraction": sums["ended"] / answers,
        "answers": answers,
        "tokens": tokens,
    }
    controller.update(stats["kl_per_answer"], int(answers))
    return replace(rollout, token_rewards=rewards), stats


def credit(
    rollout: Rollout,
    algorithm: Algorithm,
    settings: PPOConfig,
    group_size: int,
    *,
    whiten: bool | None = None,
) -> Rollout:
    """4. Advantages and returns. Collective, unless `whiten` is False (unset: the setting)."""
    advantages, returns = algorithm.credit(
        token_rewards=rollout.need("token_rewards"),
        values=rollout.values,
        mask=rollout.answer_mask,
        group_size=group_size,
        gamma=settings.gamma,
        lam=settings.lam,
        whiten=settings.whiten_advantages if whiten is None else whiten,
        group_std=settings.group_std,
        all_reduce=comm.all_reduce,
    )
    return replace(rollout, advantages=advantages, returns=returns)


def correct_sampler(rollout: Rollout, cap: float | None) -> tuple[Rollout, dict[str, float]]:
    """Advantages weighted for tokens that another engine sampled, where `cap` is set; and how far
    its log-probs are from ours, over all ranks. Nothing where the policy itself sampled."""
    reported = rollout.sampler_log_probs
    if reported is None:
        return rollout, {}
    mask, old = rollout.answer_mask, rollout.need("log_probs")
    gap = sampler_gap(old, reported, mask).abs()
    weights = importance_weights(old, reported, mask, cap or 1.0)
    sums = comm.sum_over_ranks(
        {
            "tokens": float(mask.sum()),
            "gap": float(gap.double().sum()),
            "weight": float((weights * mask).double().sum()),
        }
    )
    tokens = max(sums["tokens"], 1.0)
    stats = {
        "sampler_gap": sums["gap"] / tokens,
        "sampler_gap_max": float(comm.all_reduce(gap.max(), "max")),
    }
    if cap is None:
        return rollout, stats
    stats["importance_weight"] = sums["weight"] / tokens
    return replace(rollout, advantages=rollout.need("advantages") * weights), stats


class Clock:
    """Seconds and peak memory of named phases, this rank's; `pace` compares ranks."""

    def __init__(self, pace: Stragglers | None = None) -> None:
        self._pace = pace
        if pace is not None:
            pace.skip()
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        peak_since_last()
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self.peaks[name] = max(self.peaks.get(name, 0.0), peak_since_last())
        self._last = now
        if self._pace is not None:
            self._pace.lap(name)
