"""Asking a judge, which is a user's code as often as ours: what it gives is checked."""

from __future__ import annotations

import math
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from rlhf.data.judges import Judge
from rlhf.errors import UserError

SHOWN = 300  # characters of a prompt or an answer in a message


class JudgeFailed(UserError):
    """A judge raised an error, took too long, or gave something other than a number per answer."""


def judged(
    judge: Judge,
    prompts: Sequence[str],
    answers: Sequence[str],
    ended: Sequence[bool],
    *,
    seconds: float | None = None,
) -> list[float]:
    """The judge's points: one finite float per answer, higher is better.

    The judge runs in a thread of its own and is given up after `seconds`; it may go on in the
    background until the process ends. Raises JudgeFailed, with the judge's name, what it did, and
    the input that it was given.
    """
    given = _given(f"{len(answers)} answers, the first:", prompts, answers, ended, 0)
    values = _called(judge, (list(prompts), list(answers), list(ended)), seconds, given)
    if isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
        raise JudgeFailed(
            f"judge {judge.name!r} returned {values!r:.80}, and must return a list with one number "
            f"per answer. It was given {given}"
        )
    values = list(values)
    if len(values) != len(answers):
        raise JudgeFailed(
            f"judge {judge.name!r} returned {len(values)} scores for {len(answers)} answers: it "
            f"must return one number per answer. It was given {given}"
        )
    points = [_number(value) for value in values]
    for index, (number, value) in enumerate(zip(points, values, strict=True)):
        if number is None:
            where = _given(f"as answer {index + 1} of", prompts, answers, ended, index)
            raise JudgeFailed(
                f"judge {judge.name!r} returned {value!r:.80}, which is no finite number. It was "
                f"given {where}"
            )
    return [number for number in points if number is not None]


def _called(judge: Judge, rows: tuple[Any, ...], seconds: float | None, given: str) -> Any:
    """What the judge returns. Raises JudgeFailed: it raised something, or took too long."""
    box: dict[str, Any] = {}

    def call() -> None:
        try:
            box["values"] = judge.score(*rows)
        except BaseException as error:  # noqa: BLE001 - SystemExit too: it must not end the step
            box["error"] = error

    thread = threading.Thread(target=call, name="judge", daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in box:
        error = box["error"]
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise JudgeFailed(
            f"judge {judge.name!r} raised {type(error).__name__}: {error} ({last.filename}, line "
            f"{last.lineno}). It was given {given}"
        ) from error
    if "values" not in box:
        raise JudgeFailed(
            f"judge {judge.name!r} gave nothing in {seconds:g} s (step3.eval.judge_timeout; null "
            f"waits for ever). It was given {given}"
        )
    return box["values"]


def _number(value: Any) -> float | None:
    """None for what is no finite number; text that looks like one is none."""
    if value is None or isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # torch's word for a tensor of several numbers
        return None
    return number if math.isfinite(number) else None


def _given(
    what: str, prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool], index: int
) -> str:
    if not answers:
        return "no answers"
    return (
        f"{what} prompt {prompts[index][-SHOWN:]!r}, answer {answers[index][:SHOWN]!r}, ended "
        f"{ended[index]}"
    )
