"""Judges: scores of answers by rules that no model was trained on.

A reward can rise on nonsense; a judge that knows what a good answer is shows it. The table names
what ships with the project; `module:function` names a user's own. Imports nothing heavy.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data import courtesy_judge
from rlhf.errors import ConfigError, RequirementError, UserError

Scores = Callable[[Sequence[str], Sequence[str], Sequence[bool]], list[float]]


@dataclass(frozen=True)
class Judge:
    """A named judge.

    `score(prompts, answers, ended)` gives one float per answer, higher is better; `ended` says
    whether each answer stopped by itself. `good` says whether a score is that of a fully good
    answer; shares of good answers are reported.
    """

    name: str
    score: Scores
    good: Callable[[float], bool]


def _courtesy() -> Judge:
    def score(prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
        return [courtesy_judge.judge(*row) for row in zip(prompts, answers, ended, strict=True)]

    return Judge("courtesy", score, good=lambda value: value >= courtesy_judge.FULL_SCORE)


def _vader() -> Judge:
    """vaderSentiment's compound score, -1 to 1; above 0.05 is positive (its authors' threshold)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "vaderSentiment":
            raise
        raise RequirementError(
            "judge 'vader' needs the package vaderSentiment, which is not installed: "
            "pip install vaderSentiment"
        ) from None
    polarity = SentimentIntensityAnalyzer().polarity_scores

    def score(prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
        rows = zip(prompts, answers, ended, strict=True)
        return [float(polarity(answer)["compound"]) for _, answer, _ in rows]

    return Judge("vader", score, good=lambda value: value > 0.05)


JUDGES: dict[str, Callable[[], Judge]] = {"courtesy": _courtesy, "vader": _vader}


def resolve_judge(name: str) -> Judge:
    """The judge of that name: one of JUDGES, or `module:function`.

    A user's function takes the prompts, the answers and whether each ended (three lists), and
    returns one number per answer. A score above 0 counts as good; set the function's attribute
    `good` (a function of one score) to say otherwise. Raises ConfigError for an unknown name or a
    path that leads to nothing callable, RequirementError when a judge's package is missing.
    What the function itself raises is not caught.
    """
    if name in JUDGES:
        return JUDGES[name]()
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(
            f"judge {name!r}: unknown; choose one of {', '.join(JUDGES)}, "
            "or your own as module:function"
        )
    function = _imported(name, module_name, attribute)
    good = getattr(function, "good", lambda value: value > 0)
    return Judge(name, _lists(function), good)


def _imported(name: str, module_name: str, attribute: str) -> Callable[..., Any]:
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != module_name and not module_name.startswith(f"{missing}."):
            raise  # the module exists and lacks something of its own: its traceback says what
        raise ConfigError(
            f"judge {name!r}: no module {missing!r}; it must be importable from the "
            "working directory or PYTHONPATH"
        ) from None
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ConfigError(f"judge {name!r}: {module_name} has no {attribute!r}")
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(
            f"judge {name!r}: {attribute!r} is a {type(target).__name__}, no function"
        )
    return target


def _lists(function: Callable[..., Any]) -> Scores:
    """A user's function gets lists; what it gives is checked by rlhf.evaluation.judging."""

    def score(prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool]) -> Any:
        return function(list(prompts), list(answers), list(ended))

    return score


def problem_with(name: str) -> tuple[str, int]:
    """(why the judge cannot be used, exit code); ("", 0) if it can. Imports a user's module, which
    may do anything: ask in a process of its own."""
    try:
        resolve_judge(name)
    except UserError as error:
        return str(error), error.exit_code
    except (Exception, SystemExit) as error:  # noqa: BLE001  a user's module may raise anything
        module = name.partition(":")[0]
        why = f"judge {name!r}: importing {module} raises {type(error).__name__}: {error}"
        return why, ConfigError.exit_code
    return "", 0


if __name__ == "__main__":  # python -m rlhf.data.judges NAME: what the checks before a start ask
    with open(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)  # what a user's module prints is not part of the answer
        found = problem_with(sys.argv[1])
        answer.write(json.dumps({"problem": found[0], "exit_code": found[1]}))
