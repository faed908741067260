"""Judges: scores of answers by rules that no model was trained on.

A reward can rise on nonsense; a judge that knows what a good answer is shows it. The table names
what ships with the project; `module:function` names a user's own. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.errors import ConfigError, RequirementError
from rlhf.rewards.functions import RewardFunction, imported, reward_function


@dataclass(frozen=True)
class Judge:
    """A named judge: a reward that nobody trains on.

    `score` gives one number per answer, higher is better. `good` says whether a score is that of a
    fully good answer; shares of good answers are reported.
    """

    name: str
    score: RewardFunction
    good: Callable[[float], bool]


def _courtesy() -> Judge:
    from rlhf.data import courtesy_judge  # the package is slow to import, and not all ask for this

    def score(prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
        return [courtesy_judge.judge(*row) for row in zip(prompts, answers, ended, strict=True)]

    function = reward_function("courtesy", score, "judge")
    return Judge("courtesy", function, good=lambda value: value >= courtesy_judge.FULL_SCORE)


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

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(polarity(answer)["compound"]) for answer in answers]

    return Judge("vader", reward_function("vader", score, "judge"), good=lambda value: value > 0.05)


JUDGES: dict[str, Callable[[], Judge]] = {"courtesy": _courtesy, "vader": _vader}


def resolve_judge(name: str) -> Judge:
    """The judge of that name: one of JUDGES, or `module:function`.

    A user's function takes the prompts, the answers, and by their names the columns that it wants
    (`ended`: whether each answer stopped by itself; those of data.keep_columns), all as lists, and
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
    function = imported(name, "judge")
    good = getattr(function, "good", lambda value: value > 0)
    return Judge(name, reward_function(name, function, "judge"), good)
