"""How good a reward model is on held-out pairs, beyond one accuracy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence

from rlhf.evaluation.intervals import Interval, by_prompt, mean_interval, share_interval


def pair_metrics(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    prompts: Sequence[Hashable],
) -> dict[str, float]:
    """Accuracy, margin, loss, calibration, and accuracy by answer length (ALGORITHM.md 11, 40).

    Equal scores count half. `_low` and `_high` are ends of 95% intervals over prompts, absent for a
    single prompt. `accuracy` is a mean over prompts, each with the mean of its pairs, and so is
    `loss`. `length_baseline` is the accuracy of choosing by length alone, and
    `above_length_baseline` what the model has over it, on the same pairs.
    `accuracy_chosen_longer` and `_shorter` part ways when the model only prefers length.
    `calibration_error` is the expected calibration error of sigmoid(margin) over ten equal bins
    (Guo et al. 2017, eq. 3): each pair is read in both orders, so that both classes occur.

    Args:
        prompts: what says which pairs have the same prompt, e.g. a normalised text's hash.
    """
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    if not margins:
        return {}
    longer = [c - r for c, r in zip(chosen_lengths, rejected_lengths, strict=True)]
    right = [_right(m) for m in margins]
    by_length = _right_by_length(longer, prompts)
    metrics = {
        "margin": sum(margins) / len(margins),
        "calibration_error": _calibration_error(margins),
        "pairs": float(len(margins)),
        "prompts": float(len(set(prompts))),
        "length_baseline": sum(by_prompt(prompts, by_length)) / len(set(prompts)),
    }
    metrics |= _share("accuracy", right, prompts)
    metrics |= _mean("loss", [_softplus(-m) for m in margins], prompts)
    above = [a - b for a, b in zip(right, by_length, strict=True)]
    metrics |= _mean("above_length_baseline", above, prompts)
    lengths = [(c + r) / 2 for c, r in zip(chosen_lengths, rejected_lengths, strict=True)]
    cuts = sorted(lengths)
    low, high = cuts[len(cuts) // 3], cuts[2 * len(cuts) // 3]
    buckets = {
        "chosen_longer": [d > 0 for d in longer],
        "chosen_shorter": [d < 0 for d in longer],
        "equal_length": [d == 0 for d in longer],
        "short_answers": [n < low for n in lengths],
        "middle_answers": [low <= n < high for n in lengths],
        "long_answers": [n >= high for n in lengths],
    }
    for name, inside in buckets.items():
        part = [i for i, yes in enumerate(inside) if yes]
        if part:
            keys = [prompts[i] for i in part]
            metrics |= _share(f"accuracy_{name}", [right[i] for i in part], keys)
    return metrics


def _right(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _right_by_length(longer: Sequence[int], prompts: Sequence[Hashable]) -> list[float]:
    """Of each pair: is it right to take the longer (or the shorter) answer?

    Which of the two is learned from the other half of the prompts, so that the baseline is no
    better than it could be on new prompts; the halves are fixed by the prompts themselves.
    """
    half = [hashlib.sha256(repr(key).encode()).digest()[0] % 2 for key in prompts]
    votes = [0, 0]
    for which, difference in zip(half, longer, strict=True):
        votes[which] += (difference > 0) - (difference < 0)
    signs = [1 if votes[1 - which] >= 0 else -1 for which in (0, 1)]
    return [_right(signs[which] * d) for which, d in zip(half, longer, strict=True)]


def _share(name: str, right: Sequence[float], prompts: Sequence[Hashable]) -> dict[str, float]:
    return _named(name, share_interval(by_prompt(prompts, right), len(right)))


def _mean(name: str, values: Sequence[float], prompts: Sequence[Hashable]) -> dict[str, float]:
    return _named(name, mean_interval(by_prompt(prompts, values)))


def _named(name: str, interval: Interval) -> dict[str, float]:
    named = {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {key: value for key, value in named.items() if value is not None}


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _calibration_error(margins: Sequence[float], bins: int = 10) -> float:
    """Weighted mean over bins of |share of right orders - mean predicted probability|."""
    cases = [(_sigmoid(m), 1.0) for m in margins] + [(_sigmoid(-m), 0.0) for m in margins]
    error = 0.0
    for index in range(bins):
        inside = [c for c in cases if min(int(c[0] * bins), bins - 1) == index]
        if inside:
            predicted = sum(p for p, _ in inside) / len(inside)
            actual = sum(hit for _, hit in inside) / len(inside)
            error += len(inside) / len(cases) * abs(actual - predicted)
    return error
