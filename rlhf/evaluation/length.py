"""How much of a gain is left between answers of equal length."""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Sequence

from rlhf.evaluation.intervals import Interval, jackknife

BUCKETS = 10

Sums = list[float]  # of one bucket: n, after, length, score; aa, ll, al, as, ls


def gain_within_lengths(
    keys: Sequence[Hashable],
    before: tuple[Sequence[int], Sequence[float]],
    after: tuple[Sequence[int], Sequence[float]],
) -> Interval | None:
    """Rise of the score between answers of equal length, with a jackknife over prompts.

    Least squares with a level for each of ten buckets of length (arXiv 2310.03716 compares within
    buckets) and one slope of length inside them, for a bucket is not one length. Prompts weigh
    alike. None where no bucket holds answers of both models, or length and model are the same
    thing: then nothing says what the rise is due to.

    Args:
        keys: the prompt of each answer, the same for both models.
        before, after: lengths in tokens and scores of each model's answers.
    """
    pooled = sorted([*before[0], *after[0]])
    cuts = [pooled[len(pooled) * i // BUCKETS] for i in range(1, BUCKETS)]
    share = {key: 1 / n for key, n in _counts(keys).items()}
    parts: dict[Hashable, dict[int, Sums]] = {}
    for late, (lengths, scores) in ((0.0, before), (1.0, after)):
        for key, length, score in zip(keys, lengths, scores, strict=True):
            bucket = bisect.bisect_right(cuts, length)
            sums = parts.setdefault(key, {}).setdefault(bucket, [0.0] * 9)
            _add(sums, _moments(late, float(length), score, share[key]))
    total: dict[int, Sums] = {}
    for part in parts.values():
        for bucket, sums in part.items():
            _add(total.setdefault(bucket, [0.0] * 9), sums)
    whole = _effect(list(total.values()))
    if whole is None:
        return None
    without = []
    for part in parts.values():
        left = [
            [a - b for a, b in zip(sums, part[bucket], strict=True)] if bucket in part else sums
            for bucket, sums in total.items()
        ]
        effect = _effect(left)
        if effect is None:  # one prompt carries it all
            return None
        without.append(effect)
    return jackknife(whole, without)


def _counts(keys: Sequence[Hashable]) -> dict[Hashable, int]:
    counts: dict[Hashable, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return counts


def _moments(a: float, x: float, s: float, weight: float) -> Sums:
    return [weight * m for m in (1.0, a, x, s, a * a, x * x, a * x, a * s, x * s)]


def _add(sums: Sums, more: Sums) -> None:
    for index, value in enumerate(more):
        sums[index] += value


def _effect(buckets: Sequence[Sums]) -> float | None:
    """The coefficient of `after`, once bucket means are taken out of everything."""
    aa = xx = ax = a_s = xs = 0.0
    for n, a, x, s, a2, x2, a_x, a_score, x_score in buckets:
        if n > 1e-9:
            aa += a2 - a * a / n
            xx += x2 - x * x / n
            ax += a_x - a * x / n
            a_s += a_score - a * s / n
            xs += x_score - x * s / n
    if aa < 1e-6:
        return None
    if xx < 1e-6:
        return a_s / aa
    left = aa - ax * ax / xx
    return (a_s - ax * xs / xx) / left if left > 0.02 * aa else None
