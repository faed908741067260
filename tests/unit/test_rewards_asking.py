"""A judge is somebody's code: what it gives is taken only where it is what was asked for."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from rlhf.rewards import Asked, RewardFailed, RewardFunction, asked

PROMPTS, ANSWERS, ENDED = ["p1", "p2", "p3"], ["a", "bb", "ccc"], [True, False, True]


def ask(function: Any, seconds: float | None = None, rows: Any = None) -> list[float]:
    prompts, answers, ended = (PROMPTS, ANSWERS, ENDED) if rows is None else rows

    def score(prompts: Any, answers: Any, ended: Any) -> Any:
        return function(prompts, answers, ended)

    how = Asked("judge", seconds, "step3.eval.judge_timeout")
    return asked(RewardFunction("mine:points", score), prompts, answers, {"ended": ended}, how)


def test_points() -> None:
    """Whatever counts as a number: ints, bools, array scalars, one-element tensors."""
    import numpy as np
    import torch

    assert ask(lambda p, a, e: [len(x) for x in a]) == [1.0, 2.0, 3.0]
    assert ask(lambda p, a, e: e) == [1.0, 0.0, 1.0]
    assert ask(lambda p, a, e: np.array([1, 2, 3], dtype=np.float32)) == [1.0, 2.0, 3.0]
    assert ask(lambda p, a, e: torch.tensor([1.0, 2.0, 3.0])) == [1.0, 2.0, 3.0]
    assert ask(lambda p, a, e: (float(len(x)) for x in p)) == [2.0, 2.0, 2.0]
    assert ask(lambda p, a, e: [], rows=([], [], [])) == []


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            lambda p, a, e: [0.0, None, 1.0],
            r"returned None, .*answer 2 of prompt 'p2', answer 'bb'",
        ),
        (lambda p, a, e: [0.0, 1.0, float("nan")], r"returned nan.*'p3', answer 'ccc', ended True"),
        (lambda p, a, e: [float("inf")] * 3, r"returned inf"),
        (lambda p, a, e: ["0.5"] * 3, r"returned '0.5'"),
        (lambda p, a, e: [[1.0], 1.0, 1.0], r"returned \[1.0\]"),
        (lambda p, a, e: [1.0], r"returned 1 scores for 3 answers"),
        (lambda p, a, e: [1.0] * 4, r"returned 4 scores for 3 answers"),
        (lambda p, a, e: None, r"returned None, and must return a list"),
        (lambda p, a, e: "1.0 2.0 3.0", r"must return a list"),
        (lambda p, a, e: {"p1": 1.0}, r"must return a list"),
        (lambda p, a: [1.0] * 3, r"raised TypeError"),
        (
            lambda p, a, e: 1 / 0,
            r"raised ZeroDivisionError: .*test_rewards_asking.py, line \d+",
        ),
        (lambda p, a, e: exit(3), r"raised SystemExit"),
    ],
)
def test_what_is_no_list_of_numbers(function: Any, said: str) -> None:
    """The judge is named, with what it did and what it was given."""
    with pytest.raises(RewardFailed, match=said) as caught:
        ask(function)
    assert "judge 'mine:points'" in str(caught.value)
    assert "prompt 'p" in str(caught.value)


def test_a_judge_that_does_not_come_back() -> None:
    stop = threading.Event()
    with pytest.raises(RewardFailed, match=r"gave nothing in 0\.1 s .*step3\.eval\.judge_timeout"):
        ask(lambda p, a, e: stop.wait() and [], seconds=0.1)
    stop.set()
