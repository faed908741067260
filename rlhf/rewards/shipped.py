"""Rewards that ship with the project: rules that can be checked, and cannot be talked round.

Each is made by a function of its options, which `step3.rewards` gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rlhf.errors import ConfigError
from rlhf.rewards.endpoint import http_endpoint
from rlhf.rewards.functions import RewardFunction

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


def length(unit: Literal["words", "characters"] = "words") -> RewardFunction:
    """How long the answer is; with a negative weight, shorter is better."""
    if unit not in ("words", "characters"):
        raise ConfigError(f"reward 'length': unit {unit!r}: must be words or characters")

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(len(a.split() if unit == "words" else a)) for a in answers]

    return RewardFunction("length", score, may=())


def regex(pattern: str, full: bool = False) -> RewardFunction:
    """1 where the answer matches `pattern` (anywhere; `full`: as a whole), else 0.

    Python's syntax; `.` matches line breaks too.
    """
    compiled = _compiled(pattern, "regex")
    match = compiled.fullmatch if full else compiled.search

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(match(answer) is not None) for answer in answers]

    return RewardFunction("regex", score, may=())


def exact_match(
    column: str = "answer", extract: str | None = None, ignore_case: bool = False
) -> RewardFunction:
    """1 where the answer is the text in the row's `column`, spaces at both ends aside, else 0.

    extract: a pattern; what its last match's first group (or the whole match) says is compared, and
    an answer without a match is wrong.
    """
    said = _extraction(extract, "exact_match")

    def score(prompts: Sequence[str], answers: Sequence[str], **columns: Any) -> list[float]:
        rows = zip(answers, columns[column], strict=True)
        return [float(_same_text(said(answer), right, ignore_case)) for answer, right in rows]

    return RewardFunction("exact_match", score, needs=(column,), may=())


def numeric_match(
    column: str = "answer", extract: str | None = None, tolerance: float = 1e-6
) -> RewardFunction:
    """1 where the answer's last number is that in the row's `column`, else 0.

    Thousands may have commas. extract: as in `exact_match`; the number is looked for in what it
    says. tolerance: relative, of the larger of the two, and absolute below 1.
    """
    said = _extraction(extract, "numeric_match")

    def score(prompts: Sequence[str], answers: Sequence[str], **columns: Any) -> list[float]:
        return [
            float(_same_number(_last_number(said(answer)), _target(right, column), tolerance))
            for answer, right in zip(answers, columns[column], strict=True)
        ]

    return RewardFunction("numeric_match", score, needs=(column,), may=())


SHIPPED: dict[str, Callable[..., RewardFunction]] = {
    "length": length,
    "regex": regex,
    "exact_match": exact_match,
    "numeric_match": numeric_match,
    "http": http_endpoint,
}


def _compiled(pattern: str, name: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise ConfigError(
            f"reward {name!r}: {pattern!r} is no regular expression: {error}"
        ) from None


def _extraction(pattern: str | None, name: str) -> Callable[[str], str | None]:
    if pattern is None:
        return lambda answer: answer
    compiled = _compiled(pattern, name)

    def said(answer: str) -> str | None:
        matches = list(compiled.finditer(answer))
        return matches[-1].group(1 if compiled.groups else 0) if matches else None

    return said


def _same_text(said: str | None, right: Any, ignore_case: bool) -> bool:
    if said is None:
        return False
    ours, theirs = said.strip(), str(right).strip()
    return ours.casefold() == theirs.casefold() if ignore_case else ours == theirs


def _last_number(text: str | None) -> float | None:
    found = _NUMBER.findall(text or "")
    return float(found[-1].replace(",", "")) if found else None


def _target(right: Any, column: str) -> float:
    """Raises ConfigError: a column that is to be met and holds no number rewards nothing."""
    number = float(right) if isinstance(right, (int, float)) else _last_number(str(right))
    if number is None:
        raise ConfigError(
            f"reward 'numeric_match': column {column!r} holds {right!r:.80}, in which there is no "
            "number"
        )
    return number


def _same_number(said: float | None, right: float, tolerance: float) -> bool:
    if said is None:
        return False
    return abs(said - right) <= tolerance * max(1.0, abs(said), abs(right))
