"""rlhf.evaluation.answers, compare, variety, length: figures of answers by hand."""

from __future__ import annotations

import json
import math
import random
import statistics
from typing import Any

import pytest

from rlhf.evaluation.answers import AnswerRecord, distinct_2, summarise
from rlhf.evaluation.compare import compare
from rlhf.evaluation.length import gain_within_lengths
from rlhf.evaluation.variety import compare_variety, distinct_2_at, pairs_by_prompt


def record(**changes: Any) -> AnswerRecord:
    values: dict[str, Any] = {
        "prompt": "p", "answer": "a", "ids": [1, 2], "ended": True, "score": 0.0, "kl": 0.0,
        "judge": None,
    }  # fmt: skip
    return AnswerRecord(**(values | changes))


def test_json() -> None:
    one = record(score=0.1, kl=-3.5, ids=[5, 6], judge=None, answer="naïve\n")
    assert AnswerRecord.from_json(json.loads(json.dumps(one.as_json()))) == one


def test_distinct_2() -> None:
    """Different pairs over all pairs, of all answers together; pairs do not cross answers."""
    assert distinct_2([[1, 2, 3], [2, 3, 1]]) == 3 / 4  # 12 23 | 23 31
    assert distinct_2([[7, 7, 7, 7]]) == 1 / 3
    assert distinct_2([[1], []]) == 0.0
    assert distinct_2([[1, 2], [2, 1]]) == 1.0


def test_distinct_2_of_a_draw_is_the_mean_over_all_draws() -> None:
    """The closed form against drawing pairs many times, whole and without each prompt."""
    rng = random.Random(0)
    answers = [[rng.randrange(6) for _ in range(9)] for _ in range(6)]
    keys = ["a", "b", "c", "a", "b", "c"]
    prompts = pairs_by_prompt(keys, answers)
    found, without = distinct_2_at(prompts, 20)

    def drawn(parts: list[Any]) -> float:
        pairs = [pair for part in parts for pair in part.elements()]
        return statistics.fmean(len(set(rng.sample(pairs, 20))) / 20 for _ in range(4000))

    assert found == pytest.approx(drawn(prompts), abs=0.004)
    for index, value in enumerate(without):
        left = [part for i, part in enumerate(prompts) if i != index]
        assert value == pytest.approx(drawn(left), abs=0.004)
    assert distinct_2(answers) < found  # fewer pairs, more of them different


def test_length_alone_does_not_move_variety() -> None:
    """The same source of tokens at twice the length: distinct-2 falls, the ratio does not."""
    rng = random.Random(1)

    def answers(length: int) -> list[list[int]]:
        return [[int(60 ** rng.random()) for _ in range(length)] for _ in range(100)]

    keys = list(range(100))
    short, long = answers(10), answers(20)
    assert distinct_2(long) < 0.85 * distinct_2(short)
    found = compare_variety(pairs_by_prompt(keys, short), pairs_by_prompt(keys, long))
    assert found is not None
    assert found.after == pytest.approx(found.before, rel=0.1)
    ratio = found.ratio
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low < 1 < ratio.high
    assert ratio.high - ratio.low < 0.15
    assert (
        compare_variety(pairs_by_prompt([1, 2], [[1], [2]]), pairs_by_prompt([1, 2], [[1], [2]]))
        is None
    )


def test_summary_counts_a_prompt_once() -> None:
    """Rewards 1, 3 of one prompt, 5 of another: of 2 and 5; t(1) = 12.706, s = 3 / sqrt 2."""
    records = [
        record(score=1.0, kl=2.0, ids=[1, 2, 3], ended=True, judge=3.0),
        record(score=3.0, kl=-1.0, ids=[1, 2], ended=False, judge=1.0, prompt=" P\n"),
        record(score=5.0, kl=5.0, ids=[9], ended=True, judge=3.0, prompt="q"),
    ]
    found = summarise(records, good=lambda points: points >= 3)
    assert (found["answers"], found["prompts"]) == (3.0, 2.0)
    assert found["reward"] == 3.5
    assert found["reward_high"] - 3.5 == pytest.approx(12.706 * 1.5, abs=0.01)
    assert found["reward_std"] == 2.0
    assert found["kl"] == 2.75
    assert found["kl_per_token"] == 1.0
    assert found["length"] == 1.75
    assert found["eos_fraction"] == 0.75
    assert found["judge"] == 2.5
    assert found["judge_good"] == 0.75
    assert found["distinct_2"] == pytest.approx(2 / 3)
    assert "judge" not in summarise(records, good=None)
    assert "judge" not in summarise([record(), record()], good=bool)


def test_one_prompt_has_no_interval() -> None:
    found = summarise([record(score=1.0)], good=None)
    assert "reward_low" not in found
    assert "reward_std" not in found
    change = compare([record()], [record(score=5.0)], None)["reward"]
    assert (change.change, change.low, change.outcome) == (5.0, None, "not told apart")


def test_the_gain_is_paired() -> None:
    """The interval is of the differences, 1, 2, 3: prompts hard for both do not widen it."""
    before = [record(prompt=str(i), score=s) for i, s in enumerate((0.0, 10.0, 20.0))]
    after = [record(prompt=str(i), score=s) for i, s in enumerate((1.0, 12.0, 23.0))]
    gain = compare(before, after, None)["reward"]
    assert gain.change == 2.0
    assert gain.low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-3)
    assert gain.outcome == "not told apart"
    assert compare(after, before, None)["reward"].change == -2.0
    with pytest.raises(ValueError, match="different prompts"):
        compare(before, after[::-1], None)


def test_outcomes() -> None:
    def rows(score: float, length: int) -> list[AnswerRecord]:
        return [
            record(
                prompt=str(i), score=score + 0.1 * (i % 3) * score, ids=[1, 2] * (length + i % 2)
            )
            for i in range(30)
        ]

    found = compare(rows(0.1, 4), rows(2.0, 9), None)
    assert found["reward"].outcome == "better"
    assert found["length"].outcome == "higher"
    assert found["eos_fraction"].outcome == "not told apart"
    assert found["eos_fraction"].low is not None
    assert found["eos_fraction"].low < -0.01  # 30 of 30 is not certainty
    assert compare(rows(2.0, 9), rows(0.1, 4), None)["length"].outcome == "lower"
    assert compare(rows(2.0, 9), rows(0.1, 4), None)["reward"].outcome == "worse"


def test_gain_between_answers_of_equal_length() -> None:
    """score = length / 4 + gain + noise: what length gave is taken out, whatever the gain."""
    rng = random.Random(2)
    keys = [i % 80 for i in range(160)]
    for gain in (0.0, 1.0):
        before = [rng.randrange(8, 25) for _ in keys]
        after = [n + rng.randrange(0, 9) for n in before]
        old = [n / 4 + rng.gauss(0, 0.3) for n in before]
        new = [n / 4 + gain + rng.gauss(0, 0.3) for n in after]
        found = gain_within_lengths(keys, (before, old), (after, new))
        assert found is not None
        assert statistics.fmean(new) - statistics.fmean(old) > gain + 0.7
        assert found.mean == pytest.approx(gain, abs=0.15)
        assert found.low is not None
        assert found.high is not None
        assert found.low < gain < found.high


def test_lengths_that_never_meet() -> None:
    keys = list(range(40))
    short, long = [5 + i % 3 for i in keys], [50 + i % 3 for i in keys]
    assert gain_within_lengths(keys, (short, [0.0] * 40), (long, [1.0] * 40)) is None
