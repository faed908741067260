"""Model cards of step 3's parts: each says what was measured of this very model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.config.rewards import RewardTerm, described, is_model_alone
from rlhf.evaluation.answers import AnswerRecord
from rlhf.models import model_card
from rlhf.text import normalised

TRAINING = (
    "score_normalised", "kl_per_answer", "eos_fraction", "explained_variance", "value_loss",
)  # fmt: skip
LAST = 10
SPEAKER = {"actor": "ppo", "actor_ema": "ema"}  # part of the artifact -> its name in a verdict


def training_figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the last lines of metrics.jsonl, at most LAST; what was not measured is absent."""
    last = rows[-LAST:]
    found = {"logged_iterations": float(len(last))} if last else {}
    for name in TRAINING:
        values = [float(row[name]) for row in last if name in row]
        if values:
            found[name] = sum(values) / len(values)
    return found


def figures(records: list[AnswerRecord]) -> dict[str, float]:
    """Means over a model's answers to held-out prompts."""
    count = len(records)
    return {
        "answers": float(count),
        "prompts": float(len({normalised(record.prompt) for record in records})),
        "reward": sum(record.score for record in records) / count,
        "kl": sum(record.kl for record in records) / count,
        "length": sum(len(record.ids) for record in records) / count,
        "eos_fraction": sum(record.ended for record in records) / count,
    }


def cards(
    parts: Iterable[str],
    *,
    algorithm: str,
    sft: str,
    critic: str,
    rewards: Sequence[RewardTerm],
    ema_decay: float | None,
    training: Mapping[str, float],
    evaluation: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, str]:
    """Part (actor, critic, actor_ema) -> its card.

    `sft`, `critic`: what the policies and the critic started from. `training`: of
    `training_figures`; `evaluation`: model (sft, ppo, ema) -> `figures`, once the
    policy has been evaluated; empty: there was nothing to evaluate it on.
    """
    found = {}
    for part in parts:
        if part == "critic":
            lines, base = _critic(training), critic
        else:
            lines, base = _policy(part, training, ema_decay), sft
            lines += _evaluated(SPEAKER[part], evaluation or {}, rewards)
        if evaluation is not None and not evaluation:
            lines.append("no held-out prompts: no verdict")
        found[part] = model_card(f"{algorithm.upper()} {part}", base=base, lines=lines)
    return found


def _policy(part: str, training: Mapping[str, float], ema_decay: float | None) -> list[str]:
    if part == "actor_ema":
        return [
            f"Moving average of the policy's weights over the optimiser steps, decay {ema_decay}"
        ]
    if "score_normalised" not in training:
        return []
    return [
        f"In training, mean of the last {training['logged_iterations']:.0f} logged iterations: "
        f"reward {training['score_normalised']:.3f}, KL to the SFT model "
        f"{training['kl_per_answer']:.2f} nats per answer, "
        f"{training['eos_fraction']:.1%} of answers ended"
    ]


def _critic(training: Mapping[str, float]) -> list[str]:
    lines = ["Predicts the return before each answer token; it scores no answers"]
    if "value_loss" in training:
        lines.append(
            f"In training, mean of the last {training['logged_iterations']:.0f} logged iterations: "
            f"explained variance {training['explained_variance']:.3f}, value loss "
            f"{training['value_loss']:.4f}"
        )
    return lines


def _evaluated(
    speaker: str, evaluation: Mapping[str, Mapping[str, float]], rewards: Sequence[RewardTerm]
) -> list[str]:
    if speaker not in evaluation:
        return []
    own = evaluation[speaker]
    scale = f"the reward is {described(rewards)}"
    if is_model_alone(rewards):
        scale = "reward 0 is the mean of held-out chosen answers, 1 their standard deviation"
    before = f" (SFT model {evaluation['sft']['reward']:.3f})" if "sft" in evaluation else ""
    return [
        f"Held-out reward {own['reward']:.3f}{before}: {own['answers']:.0f} answers to "
        f"{own['prompts']:.0f} prompts; {scale}",
        f"KL to the SFT model {own['kl']:.2f} nats per answer; {own['length']:.1f} tokens, "
        f"{own['eos_fraction']:.1%} of answers ended",
    ]
