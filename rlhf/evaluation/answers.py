"""Answers to held-out prompts, and what they come to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rlhf.evaluation.intervals import Interval, by_prompt, mean_interval, share_interval
from rlhf.evaluation.variety import distinct_2
from rlhf.text import normalised

__all__ = ["AnswerRecord", "Column", "column", "columns", "distinct_2", "prompt_keys", "summarise"]


TERM = "term_"


@dataclass(frozen=True)
class AnswerRecord:
    """One sampled answer: its tokens' ids, whether it ended by itself, its normalised reward,
    log(policy / reference) summed over it in nats, and a judge's points if there is a judge.

    With rewards other than the reward model alone `score` is their weighted sum, and `rewards` has
    each before its weight. `columns`: what the row has in those of data.keep_columns."""

    prompt: str
    answer: str
    ids: list[int]
    ended: bool
    score: float
    kl: float
    judge: float | None
    rewards: dict[str, float] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """In JSON's own types; what is empty by default is left out."""
        found = asdict(self)
        return {k: v for k, v in found.items() if v or k not in ("rewards", "columns")}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> AnswerRecord:
        return cls(**value)


@dataclass(frozen=True)
class Column:
    """One figure of a model: its mean over each prompt's answers; `share`: of yes and no."""

    by_prompt: list[float]
    answers: int
    share: bool

    @property
    def interval(self) -> Interval:
        if self.share:
            return share_interval(self.by_prompt, self.answers)
        return mean_interval(self.by_prompt)


def prompt_keys(records: Sequence[AnswerRecord]) -> list[str]:
    """What makes two answers' prompts the same prompt."""
    return [normalised(record.prompt) for record in records]


def column(
    records: Sequence[AnswerRecord], figure: Callable[[AnswerRecord], float], share: bool = False
) -> Column:
    values = [figure(record) for record in records]
    return Column(by_prompt(prompt_keys(records), values), len(records), share)


def columns(
    records: Sequence[AnswerRecord], good: Callable[[float], bool] | None
) -> dict[str, Column]:
    """reward, kl, length, eos_fraction, each term of the reward (`term_NAME`) if it is not a model
    alone, and with a judge judge and judge_good."""
    found = {
        "reward": column(records, lambda r: r.score),
        "kl": column(records, lambda r: r.kl),
        "length": column(records, lambda r: len(r.ids)),
        "eos_fraction": column(records, lambda r: float(r.ended), share=True),
    }
    keys = prompt_keys(records)
    for name in records[0].rewards if records else ():
        values = [record.rewards[name] for record in records]
        found[f"{TERM}{name}"] = Column(by_prompt(keys, values), len(records), share=False)
    if good is not None and all(record.judge is not None for record in records):
        is_good = good
        found["judge"] = column(records, lambda r: r.judge or 0.0)
        found["judge_good"] = column(records, lambda r: float(is_good(r.judge or 0.0)), share=True)
    return found


def summarise(
    records: Sequence[AnswerRecord], good: Callable[[float], bool] | None
) -> dict[str, float]:
    """Figures of one model: means over prompts, 95% intervals (`_low`, `_high`) over prompts.

    `kl_per_token` is the sum of KL / the sum of tokens; `reward_std` is over answers. What cannot
    be measured (an interval of a single prompt, the deviation of one answer) is absent.
    """
    found = columns(records, good)
    tokens = sum(len(r.ids) for r in records)
    summary: dict[str, float | None] = {
        "answers": float(len(records)),
        "prompts": float(len(found["reward"].by_prompt)),
        "reward_std": statistics.stdev(r.score for r in records) if len(records) > 1 else None,
        "kl_per_token": sum(r.kl for r in records) / tokens if tokens else None,
        "distinct_2": distinct_2([r.ids for r in records]),
    }
    for name, figure in found.items():
        interval = figure.interval
        summary |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {name: value for name, value in summary.items() if value is not None}
