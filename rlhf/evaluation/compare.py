"""Two models' answers to the same prompts, figure by figure: better, worse, or not told apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.evaluation.answers import TERM, AnswerRecord, columns, prompt_keys
from rlhf.evaluation.intervals import Interval, mapped, mean_interval, share_change
from rlhf.evaluation.length import gain_within_lengths
from rlhf.evaluation.variety import compare_variety, pairs_by_prompt

BETTER, WORSE, NOT_TOLD_APART = "better", "worse", "not told apart"
HIGHER, LOWER = "higher", "lower"  # of length and of a reward's terms: neither good nor bad


@dataclass(frozen=True)
class Comparison:
    """before, after, the change with its 95% interval over prompts, and what that shows.

    `outcome` is better (higher, for length) where the interval is above 0, worse (lower) where it
    is below, else not told apart.
    """

    before: float
    after: float
    change: float
    low: float | None
    high: float | None
    outcome: str

    def as_json(self) -> dict[str, Any]:
        found = self.__dict__.items()
        return {name: value for name, value in found if value is not None}

    def shows_at_least(self, bound: float) -> bool:
        """The whole interval is above `bound`."""
        return self.low is not None and self.low > bound


def number(value: float, form: str) -> str:
    """A figure as text in one of format's forms; what rounds to 0 has no minus sign."""
    text = format(value, form)
    zero = not text.strip("+-0.%")
    return text.replace("-", "+" if form.startswith("+") else "") if zero else text


def compared(before: float, after: float, change: Interval, *, neutral: bool = False) -> Comparison:
    words = (HIGHER, LOWER) if neutral else (BETTER, WORSE)
    outcome = NOT_TOLD_APART
    if change.low is not None and change.high is not None:
        if change.low > 0:
            outcome = words[0]
        elif change.high < 0:
            outcome = words[1]
    return Comparison(before, after, change.mean, change.low, change.high, outcome)


def compare(
    before: Sequence[AnswerRecord],
    after: Sequence[AnswerRecord],
    good: Callable[[float], bool] | None,
) -> dict[str, Comparison]:
    """All figures that both models have, paired by prompt.

    `distinct_2`'s change is relative (-0.1: a tenth of the variety is gone), at an equal number of
    token pairs; `reward_within_lengths` is the rise between answers of equal length. Both are
    absent where they cannot be measured. Raises ValueError unless both answered the same prompts
    in the same order.
    """
    keys = prompt_keys(before)
    if keys != prompt_keys(after):
        raise ValueError("the models' answers are to different prompts: nothing can be paired")
    one, two = columns(before, good), columns(after, good)
    found = {}
    for name in one.keys() & two.keys() - {"kl"}:
        old, new = one[name], two[name]
        if old.share:
            change = share_change(old.by_prompt, new.by_prompt, old.answers)
        else:
            pairs = zip(old.by_prompt, new.by_prompt, strict=True)
            change = mean_interval([b - a for a, b in pairs])
        found[name] = compared(
            old.interval.mean, new.interval.mean, change, neutral=name.startswith(("length", TERM))
        )
    within = gain_within_lengths(keys, _lengths(before), _lengths(after))
    if within is not None:
        reward = found["reward"]
        found["reward_within_lengths"] = compared(
            reward.before, reward.before + within.mean, within
        )
    variety = _variety(keys, before, after)
    if variety is not None:
        found["distinct_2"] = variety
    return found


def _lengths(records: Sequence[AnswerRecord]) -> tuple[list[int], list[float]]:
    return [len(r.ids) for r in records], [r.score for r in records]


def _variety(
    keys: Sequence[str], before: Sequence[AnswerRecord], after: Sequence[AnswerRecord]
) -> Comparison | None:
    found = compare_variety(
        pairs_by_prompt(keys, [r.ids for r in before]),
        pairs_by_prompt(keys, [r.ids for r in after]),
    )
    if found is None:
        return None
    return compared(found.before, found.after, mapped(found.ratio, lambda value: value - 1))
