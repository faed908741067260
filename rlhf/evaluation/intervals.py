"""Intervals over prompts, 95%, honest with few of them. Pure Python; imports nothing of ours.

The unit is the prompt: answers to one prompt are alike, so they are averaged first and a prompt
counts once, however many answers it has.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

LEVEL = 0.975  # the upper end of a two-sided 95% interval


class Interval(NamedTuple):
    """A mean and its 95% interval; without ends where a single prompt leaves nothing to measure."""

    mean: float
    low: float | None
    high: float | None


def by_prompt(keys: Sequence[Hashable], values: Sequence[float]) -> list[float]:
    """Mean value of each different key, in the order in which the keys first occur."""
    groups: dict[Hashable, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        groups.setdefault(key, []).append(value)
    return [statistics.fmean(group) for group in groups.values()]


def t_quantile(df: int, level: float = LEVEL) -> float:
    """Student's t with `df` degrees of freedom: the value below which a share `level` lies."""
    return _t_quantile(min(df, 400), level)  # t(400) is within 0.3% of the normal's


@functools.cache
def _t_quantile(df: int, level: float) -> float:
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + _inside(middle, df)) / 2 < level else (low, middle)
    return (low + high) / 2


def _inside(t: float, df: int) -> float:
    """P(|T| < t): the finite sums for whole degrees of freedom (Abramowitz & Stegun 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(df))
    cosine2 = math.cos(angle) ** 2
    odd = df % 2
    term = math.cos(angle) if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(2 + odd, df - 1, 2):
        term *= cosine2 * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def mean_interval(values: Sequence[float]) -> Interval:
    """Of independent values (one per prompt): Student's t with n - 1 degrees of freedom."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def share_interval(shares: Sequence[float], answers: int) -> Interval:
    """Of a share, from each prompt's share: Wilson's with the effective number of answers.

    That number is p (1 - p) / (the variance of the mean over prompts) (Korn & Graubard 1998), at
    most `answers`, and the number of prompts where nothing varies: 80 of 80 is not 100% for sure.
    """
    mean = statistics.fmean(shares)
    if len(shares) < 2:
        return Interval(mean, None, None)
    variance = statistics.variance(shares) / len(shares)
    size = float(len(shares))
    if variance > 0 and 0 < mean < 1:
        size = min(mean * (1 - mean) / variance, float(answers))
    t2 = t_quantile(len(shares) - 1) ** 2
    middle = (mean + t2 / (2 * size)) / (1 + t2 / size)
    half = math.sqrt(t2 * mean * (1 - mean) / size + t2**2 / (4 * size**2)) / (1 + t2 / size)
    return Interval(mean, max(middle - half, 0.0), min(middle + half, 1.0))


def share_change(before: Sequence[float], after: Sequence[float], answers: int) -> Interval:
    """Change of a share over the same prompts (Newcombe 1998, method 10): Wilson's intervals of
    both, joined with the correlation of the prompts' shares. It has a width also where no answer
    differs, unlike the mean of the differences."""
    one, two = share_interval(before, answers), share_interval(after, answers)
    change = two.mean - one.mean
    if one.low is None or one.high is None or two.low is None or two.high is None:
        return Interval(change, None, None)
    r = _correlation(before, after)

    def joined(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * r * a * b + b * b, 0.0))

    return Interval(
        change,
        change - joined(two.mean - two.low, one.high - one.mean),
        change + joined(two.high - two.mean, one.mean - one.low),
    )


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's; 0 where one of them does not vary."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    return statistics.correlation(a, b)


def jackknife(estimate: float, without: Sequence[float]) -> Interval:
    """Of any figure, from what it is without each prompt in turn (Tukey 1958; of regressions CR3).

    (n - 1) / n times the sum of squares about their mean is the variance; Student's t with n - 1.
    """
    count = len(without)
    if count < 2:
        return Interval(estimate, None, None)
    centre = statistics.fmean(without)
    variance = (count - 1) / count * sum((value - centre) ** 2 for value in without)
    half = t_quantile(count - 1) * math.sqrt(variance)
    return Interval(estimate, estimate - half, estimate + half)


def mapped(interval: Interval, function: Callable[[float], float]) -> Interval:
    """The interval of a rising function of the figure."""
    return Interval(*(None if end is None else function(end) for end in interval))  # type: ignore[arg-type]
