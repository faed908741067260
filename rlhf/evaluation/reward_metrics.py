"""How good a reward model is on held-out pairs, beyond one accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pair_metrics(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
) -> dict[str, float]:
    """Accuracy, margin, loss, calibration, and accuracy by answer length (ALGORITHM.md 11).

    `accuracy_chosen_longer` and `_shorter` part ways when the model only prefers length.
    `calibration_error` is the expected calibration error of sigmoid(margin) over ten equal bins
    (Guo et al. 2017, eq. 3): each pair is read in both orders, so that both classes occur.
    """
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    if not margins:
        return {}
    longer = [c - r for c, r in zip(chosen_lengths, rejected_lengths, strict=True)]
    metrics = {
        "accuracy": _share(margins),
        "margin": sum(margins) / len(margins),
        "loss": sum(_softplus(-m) for m in margins) / len(margins),
        "calibration_error": _calibration_error(margins),
        "pairs": float(len(margins)),
    }
    buckets = {
        "chosen_longer": [m for m, d in zip(margins, longer, strict=True) if d > 0],
        "chosen_shorter": [m for m, d in zip(margins, longer, strict=True) if d < 0],
        "equal_length": [m for m, d in zip(margins, longer, strict=True) if d == 0],
    }
    lengths = [(c + r) / 2 for c, r in zip(chosen_lengths, rejected_lengths, strict=True)]
    cuts = sorted(lengths)
    low, high = cuts[len(cuts) // 3], cuts[2 * len(cuts) // 3]
    named = list(zip(margins, lengths, strict=True))
    buckets["short_answers"] = [m for m, n in named if n < low]
    buckets["middle_answers"] = [m for m, n in named if low <= n < high]
    buckets["long_answers"] = [m for m, n in named if n >= high]
    for name, part in buckets.items():
        if part:
            metrics[f"accuracy_{name}"] = _share(part)
    return metrics


def _share(margins: Sequence[float]) -> float:
    return sum(m > 0 for m in margins) / len(margins)


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
