"""rlhf.evaluation.answers: figures of answers by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlhf.evaluation.answers import AnswerRecord, distinct_2, mean_interval, paired_gain, summarise


def record(**changes: Any) -> AnswerRecord:
    values: dict[str, Any] = {
        "prompt": "p", "answer": "a", "ids": [1, 2], "ended": True, "score": 0.0, "kl": 0.0,
        "judge": None,
    }  # fmt: skip
    return AnswerRecord(**(values | changes))


def test_distinct_2() -> None:
    """Different pairs over all pairs, of all answers together; pairs do not cross answers."""
    assert distinct_2([[1, 2, 3], [2, 3, 1]]) == 3 / 4  # 12 23 | 23 31
    assert distinct_2([[7, 7, 7, 7]]) == 1 / 3
    assert distinct_2([[1], []]) == 0.0
    assert distinct_2([[1, 2], [2, 1]]) == 1.0


def test_mean_interval() -> None:
    """1.96 standard errors with the unbiased deviation: of 1, 2, 3, 6 that is sqrt(14/3)."""
    mean, half = mean_interval([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert half == pytest.approx(1.96 * math.sqrt(14 / 3) / 2)
    assert mean_interval([4.0])[0] == 4.0
    assert math.isnan(mean_interval([4.0])[1])
    assert math.isnan(mean_interval([])[0])


def test_summary() -> None:
    records = [
        record(score=1.0, kl=2.0, ids=[1, 2, 3], ended=True, judge=3.0),
        record(score=3.0, kl=-1.0, ids=[1, 2], ended=False, judge=1.0),
        record(score=5.0, kl=5.0, ids=[9], ended=True, judge=3.0),
    ]
    found = summarise(records, good=lambda points: points >= 3)
    assert found["answers"] == 3.0
    assert found["reward"] == 3.0
    assert found["reward_std"] == 2.0
    assert found["reward_ci"] == pytest.approx(1.96 * 2 / math.sqrt(3))
    assert found["kl"] == 2.0
    assert found["kl_ci"] == pytest.approx(1.96 * 3 / math.sqrt(3))
    assert found["length"] == 2.0
    assert found["eos_fraction"] == pytest.approx(2 / 3)
    assert found["distinct_2"] == pytest.approx(2 / 3)
    assert found["judge"] == pytest.approx(7 / 3)
    assert found["judge_good"] == pytest.approx(2 / 3)
    assert "judge" not in summarise(records, good=None)
    assert "judge" not in summarise([record(), record()], good=bool)


def test_the_gain_is_paired() -> None:
    """The interval is of the differences: prompts that are hard for both do not widen it."""
    before = [record(score=s) for s in (0.0, 10.0, 20.0)]
    after = [record(score=s) for s in (1.0, 12.0, 23.0)]
    gain, half = paired_gain(after, before)
    assert gain == 2.0
    assert half == pytest.approx(1.96 / math.sqrt(3))
    with pytest.raises(ValueError):
        paired_gain(after, before[:2])
