"""Asking a reward function or a judge, which is a user's code as often as ours: what it gives is
checked."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.errors import UserError
from rlhf.rewards import functions
from rlhf.rewards.functions import ENDED, RewardFunction

SHOWN = 300  # characters of a prompt or an answer in a message
FLOAT32_MAX = 3.4028234663852886e38  # what training computes with
_OURS = (__file__, functions.__file__)


class RewardFailed(UserError):
    """A reward function or a judge raised an error, took too long, or gave something other than a
    number per answer."""


@dataclass(frozen=True)
class Asked:
    """What is asked (`reward` or `judge`), how long it may take, and the setting that says so."""

    what: str
    seconds: float | None
    setting: str


def asked(
    function: RewardFunction,
    prompts: Sequence[str],
    answers: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    how: Asked,
) -> list[float]:
    """The function's points: one finite float per answer, higher is better.

    It runs in a thread of its own and is given up after `how.seconds`; it may go on in the
    background until the process ends. Raises RewardFailed, with the function's name, what it did,
    and the input that it was given.
    """
    name = f"{how.what} {function.name!r}"
    rows = _Rows(prompts, answers, columns)
    values = _called(function, rows, how)
    first = rows.shown(f"{len(answers)} answers, the first:", 0)
    if isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
        raise RewardFailed(
            f"{name} returned {values!r:.80}, and must return a list with one number per answer. "
            f"It was given {first}"
        )
    values = list(values)
    if len(values) != len(answers):
        raise RewardFailed(
            f"{name} returned {len(values)} scores for {len(answers)} answers: it must return one "
            f"number per answer. It was given {first}"
        )
    points = [_number(value) for value in values]
    for index, (number, value) in enumerate(zip(points, values, strict=True)):
        if number is None:
            raise RewardFailed(
                f"{name} returned {value!r:.80}, which is no finite number. It was given "
                f"{rows.shown(f'as answer {index + 1} of', index)}"
            )
    return [number for number in points if number is not None]


@dataclass(frozen=True)
class _Rows:
    prompts: Sequence[str]
    answers: Sequence[str]
    columns: Mapping[str, Sequence[Any]]

    def shown(self, what: str, index: int) -> str:
        """One row, for a message."""
        if not self.answers:
            return "no answers"
        ended = self.columns.get(ENDED)
        others = {name: column for name, column in self.columns.items() if name != ENDED}
        said = "".join(f", {name} {others[name][index]!r:.80}" for name in others)
        return (
            f"{what} prompt {self.prompts[index][-SHOWN:]!r}, answer "
            f"{self.answers[index][:SHOWN]!r}{f', ended {ended[index]}' if ended else ''}{said}"
        )


def _called(function: RewardFunction, rows: _Rows, how: Asked) -> Any:
    """What the function returns. Raises RewardFailed: it raised something, or took too long."""
    box: dict[str, Any] = {}

    def call() -> None:
        try:
            box["values"] = function(rows.prompts, rows.answers, rows.columns)
        except BaseException as error:  # noqa: BLE001 - SystemExit too: it must not end the step
            box["error"] = error

    thread = threading.Thread(target=call, name=how.what, daemon=True)
    thread.start()
    thread.join(how.seconds)
    name = f"{how.what} {function.name!r}"
    given = rows.shown(f"{len(rows.answers)} answers, the first:", 0)
    if "error" in box:
        error = box["error"]
        if isinstance(error, UserError):  # ours, and it says it all
            raise RewardFailed(f"{name}: {error}. It was given {given}") from error
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardFailed(
            f"{name} raised {type(error).__name__}: {error} ({last.filename}, line "
            f"{last.lineno}). It was given {given}\n{_own_traceback(error)}"
        ) from error
    if "values" not in box:
        raise RewardFailed(
            f"{name} gave nothing in {how.seconds:g} s ({how.setting}; null waits for ever). It "
            f"was given {given}\n{_where(thread)}"
        )
    return box["values"]


def _own_traceback(error: BaseException) -> str:
    """The traceback from the function on: `call` and `RewardFunction.__call__` are ours."""
    theirs = error.__traceback__
    while theirs is not None and theirs.tb_frame.f_code.co_filename in _OURS:
        theirs = theirs.tb_next
    shown = theirs or error.__traceback__  # raised by the call itself: its arguments do not fit
    return "".join(traceback.format_exception(type(error), error, shown)).rstrip()


def _where(thread: threading.Thread) -> str:
    """Where a function stands that does not come back."""
    frame = sys._current_frames().get(thread.ident or 0)
    frames = traceback.extract_stack(frame) if frame else []
    own = [i for i, one in enumerate(frames) if one.filename in _OURS]
    theirs = frames[own[-1] + 1 :] if own else frames
    return "It stands at:\n" + "".join(traceback.format_list(theirs)).rstrip()


def _number(value: Any) -> float | None:
    """None for what is no finite number; text that looks like one is none."""
    if value is None or isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # torch's word for a tensor of several numbers
        return None
    return number if abs(number) <= FLOAT32_MAX else None
