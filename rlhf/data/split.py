"""Who gets which row: held-out rows and the three steps' shares, by content alone.

Rows are known by the hash of their content, so that equal rows stay together, and neither the order
of rows nor that of paths matters. What is held out is prompts: all rows of a held-out prompt, in
every data set. Steps may share prompts, never rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from rlhf.data.sources.base import sha256
from rlhf.data.typed import unguarded
from rlhf.text import normalised

# A test split that shares prompts with the training rows is cut to its other prompts if there are
# so many: a share of one half, measured on fewer, has a 95% interval wider than +-0.17.
MIN_UNSEEN = 32


@dataclass(frozen=True)
class Keys:
    """One data set's rows by the role its source gave them: content key -> the prompt's key."""

    train: Mapping[str, str]
    held_out: Mapping[str, str]
    brings_held_out: bool


@dataclass(frozen=True)
class Assignment:
    """What becomes of each content key.

    held_out: to be evaluated on. shares: training key -> the share (1, 2, ...) that it is in.
    left_out: of a test split, because their prompts are trained on and there are enough others.
    trained: the prompts' keys of all shares' rows.
    """

    held_out: frozenset[str]
    shares: Mapping[str, int]
    left_out: frozenset[str]
    trained: frozenset[str]


def prompt_key(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Equal for prompts that count as the same (`rlhf.text.normalised`).

    Of a prompt before any template: text, or messages with role and content. A single user message
    is the same prompt as its text.
    """
    if not isinstance(prompt, str):
        lone = len(prompt) == 1 and prompt[0]["role"] == "user"
        turns = [one["content"] if lone else f"{one['role']}: {one['content']}" for one in prompt]
        prompt = "\n".join(turns)
    return sha256(normalised(unguarded(prompt)))


def draw(keys: Iterable[str], seed: int, purpose: str) -> list[str]:
    """Unique keys in an order that looks random but depends on nothing but seed and purpose."""
    return sorted(set(keys), key=lambda key: sha256(f"{seed}:{purpose}:{key}"))


def assign(
    sets: Sequence[Keys], shares: Sequence[float], eval_fraction: float, seed: int
) -> Assignment:
    """Decide on every row of all data sets together.

    A data set without a test split gives up `eval_fraction` of its prompts, rounded. One that
    brings a test split is evaluated on its rows whose prompts are not trained on, where these have
    at least MIN_UNSEEN different prompts, else on all. Its prompts that its own training rows do
    not have, and those that were drawn, are trained on nowhere.

    What is left of each data set is cut at the rounded shares of its own unique keys. A key that
    several data sets have belongs to the first of them (callers order data sets by content), so
    steps stay disjoint.
    """
    brought = set[str]().union(*(one.held_out for one in sets))
    kept_back = set[str]()
    for one in sets:
        kept_back |= (
            set(one.held_out.values()) - {p for key, p in one.train.items() if key not in brought}
            if one.brings_held_out
            else _drawn(one.train, eval_fraction, seed)
        )
    prompts = {key: prompt for one in sets for key, prompt in one.train.items()}
    withheld = brought | {key for key, prompt in prompts.items() if prompt in kept_back}
    share_of: dict[str, int] = {}
    for one in sets:
        own = draw(one.train.keys() - withheld - share_of.keys(), seed, "step")
        bounds = [0, *(round(len(own) * s / sum(shares)) for s in accumulate(shares))]
        for number, (start, end) in enumerate(pairwise(bounds), 1):
            share_of.update(dict.fromkeys(own[start:end], number))
    trained = {prompts[key] for key in share_of}
    tested = set[str]().union(*(_tested(one, trained) for one in sets))
    return Assignment(
        held_out=frozenset(withheld - brought | tested),
        shares=share_of,
        left_out=frozenset(brought - tested),
        trained=frozenset(trained),
    )


def _drawn(rows: Mapping[str, str], fraction: float, seed: int) -> set[str]:
    """The prompts that a data set gives up: each has one ticket, however many rows it has."""
    tickets: dict[str, str] = {}
    for key in sorted(rows):
        tickets.setdefault(rows[key], key)
    drawn = draw(tickets.values(), seed, "held-out")
    return {rows[key] for key in drawn[: round(fraction * len(drawn))]}


def _tested(one: Keys, trained: set[str]) -> set[str]:
    """The rows of a data set's test split that are evaluated on."""
    unseen = {key for key, prompt in one.held_out.items() if prompt not in trained}
    enough = len({one.held_out[key] for key in unseen}) >= MIN_UNSEEN
    return unseen if enough else set(one.held_out)
