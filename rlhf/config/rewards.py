"""What answers are rewarded by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import model_validator

from rlhf.config.base import Section, doc

MODEL = "model"


class RewardTerm(Section):
    """One term of step 3's reward; a text alone is its `use`."""

    use: str = doc(
        MODEL,
        "`model`: the reward model; `length`, `regex`, `exact_match`, `numeric_match`; `http` (or "
        "a URL alone); or your own `module:function` of (prompts, answers, **columns).",
    )
    weight: float = doc(1.0, "The term counts so many times.", allow_inf_nan=False)
    label: str = doc(
        "", "Its name in metrics.jsonl; unset: the end of `use`.", pattern=r"^\w*$", max_length=60
    )
    options: dict[str, Any] = doc({}, "Arguments of the function by name.")
    timeout: float | None = doc(600.0, "Seconds for the answers of one iteration.", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            return {"use": "http", "options": {"url": value}}
        if isinstance(value, str):
            return {"use": value}
        ours = cls.model_fields
        if isinstance(value, dict) and (wrong := [str(name) for name in value if name not in ours]):
            raise ValueError(
                f"a reward has no {wrong[0]!r}; it has {', '.join(ours)}. What its function "
                f"takes goes into options: {{use: ..., options: {{{wrong[0]}: ...}}}}"
            )
        return value

    @model_validator(mode="after")
    def _model(self) -> RewardTerm:
        if self.use == MODEL and self.options:
            raise ValueError(f"the reward model takes no options, it was given {self.options}")
        return self

    @property
    def name(self) -> str:
        """For metrics and messages."""
        return self.label or re.sub(r"\W+", "_", self.use.rpartition(":")[2]).strip("_")


def is_model_alone(terms: Sequence[RewardTerm]) -> bool:
    """The reward is the reward model's score and nothing else."""
    return [(term.use, term.weight) for term in terms] == [(MODEL, 1.0)]


def described(terms: Sequence[RewardTerm], names: Mapping[str, str] | None = None) -> str:
    """The sum in words: `model + -0.01 x length`; `names`: another word for a `use`."""
    said = [(names or {}).get(term.use, term.use) for term in terms]
    weighted = zip(said, (term.weight for term in terms), strict=True)
    return " + ".join(use if weight == 1 else f"{weight:g} x {use}" for use, weight in weighted)


def checked_terms(terms: list[RewardTerm]) -> list[RewardTerm]:
    """Raises ValueError: none, or two of one name."""
    if not terms:
        raise ValueError("rewards is empty: nothing would be learned; leave it unset for the model")
    names = [term.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two rewards are called {name!r}: give one of them another label")
    return terms
