"""Answers to held-out prompts, and what they come to."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class AnswerRecord:
    """One sampled answer: its tokens' ids, whether it ended by itself, its normalised reward,
    log(policy / reference) summed over it in nats, and a judge's points if there is a judge."""

    prompt: str
    answer: str
    ids: list[int]
    ended: bool
    score: float
    kl: float
    judge: float | None

    def as_json(self) -> dict[str, Any]:
        """In JSON's own types."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> AnswerRecord:
        return cls(**value)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% confidence interval (normal approximation)."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def distinct_2(answers: Sequence[list[int]]) -> float:
    """Different token pairs / all token pairs over all answers (Li et al. 2016)."""
    pairs = [pair for answer in answers for pair in itertools.pairwise(answer)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def summarise(
    records: Sequence[AnswerRecord], good: Callable[[float], bool] | None
) -> dict[str, float]:
    """Figures of one model over the held-out prompts."""
    reward, half = mean_interval([r.score for r in records])
    kl, kl_half = mean_interval([r.kl for r in records])
    summary = {
        "answers": float(len(records)),
        "reward": reward,
        "reward_ci": half,
        "reward_std": statistics.stdev(r.score for r in records) if len(records) > 1 else 0.0,
        "kl": kl,
        "kl_ci": kl_half,
        "length": statistics.fmean(len(r.ids) for r in records),
        "eos_fraction": statistics.fmean(float(r.ended) for r in records),
        "distinct_2": distinct_2([r.ids for r in records]),
    }
    points = [r.judge for r in records if r.judge is not None]
    if points and good is not None:
        summary["judge"], summary["judge_ci"] = mean_interval(points)
        summary["judge_good"] = statistics.fmean(float(good(p)) for p in points)
    return summary


def paired_gain(
    after: Sequence[AnswerRecord], before: Sequence[AnswerRecord]
) -> tuple[float, float]:
    """Mean rise of the reward over the same prompts, and half its 95% interval."""
    return mean_interval([a.score - b.score for a, b in zip(after, before, strict=True)])
