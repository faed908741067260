"""rlhf.evaluation.reward_metrics by hand (11)."""

from __future__ import annotations

import math

import pytest

from rlhf.evaluation.reward_metrics import pair_metrics


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_accuracy_margin_and_loss() -> None:
    """Equal scores are not right; the loss is -log sigmoid(margin), also where exp overflows."""
    found = pair_metrics([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 3.0, 1.0], [1] * 4, [1] * 4)
    assert found["accuracy"] == 0.5
    assert found["margin"] == pytest.approx((1 + 0 - 3 + 4) / 4)
    assert found["loss"] == pytest.approx(sum(-math.log(sigmoid(m)) for m in (1, 0, -3, 4)) / 4)
    assert found["pairs"] == 4.0
    extreme = pair_metrics([0.0, 2000.0], [1000.0, 0.0], [1, 1], [1, 1])
    assert extreme["loss"] == pytest.approx(500.0)


def test_accuracy_by_length() -> None:
    """A model that always prefers the longer answer shows: 1 where chosen is longer, else 0."""
    chosen_lengths, rejected_lengths = [9, 9, 2, 3, 5], [4, 8, 6, 7, 5]
    scores = [float(n) for n in chosen_lengths], [float(n) for n in rejected_lengths]
    found = pair_metrics(*scores, chosen_lengths, rejected_lengths)
    assert found["accuracy_chosen_longer"] == 1.0
    assert found["accuracy_chosen_shorter"] == 0.0
    assert found["accuracy_equal_length"] == 0.0
    # Mean lengths 6.5, 8.5, 4, 5, 5: thirds cut at 5 and 6.5.
    assert found["accuracy_short_answers"] == 0.0  # 4
    assert found["accuracy_middle_answers"] == 0.0  # 5, 5
    assert found["accuracy_long_answers"] == 1.0  # 6.5, 8.5
    assert "accuracy_chosen_longer" not in pair_metrics([1.0], [0.0], [1], [2])


def test_calibration() -> None:
    """Each pair in both orders, ten bins (Guo et al. 2017, eq. 3)."""
    # Always 0.88 sure and always right: the bins of 0.88 and 0.12 are both 0.12 off.
    sure = pair_metrics([2.0] * 3, [0.0] * 3, [1] * 3, [1] * 3)
    assert sure["calibration_error"] == pytest.approx(1 - sigmoid(2.0))
    # Right 3 times of 4 at sigmoid(log 3) = 0.75: perfectly calibrated.
    margin = math.log(3)
    even = pair_metrics([margin, margin, margin, 0.0], [0.0, 0.0, 0.0, margin], [1] * 4, [1] * 4)
    assert even["calibration_error"] == pytest.approx(0.0, abs=1e-12)
    # No opinion: 0.5 predicted, 0.5 right.
    none = pair_metrics([0.0], [0.0], [1], [1])
    assert none["calibration_error"] == pytest.approx(0.0)
    # Margin 0.1 (p = 0.525) right, 4 (q = 0.982) wrong: four cases in four bins, in both orders
    # 1 - p off and q off.
    p, q = sigmoid(0.1), sigmoid(4.0)
    mixed = pair_metrics([0.1, 0.0], [0.0, 4.0], [1, 1], [1, 1])
    assert mixed["calibration_error"] == pytest.approx((2 * (1 - p) + 2 * q) / 4)


def test_nothing_held_out() -> None:
    assert pair_metrics([], [], [], []) == {}
