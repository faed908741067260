"""Who gets which row: held-out rows and the three steps' shares, by content alone.

Rows are known by the hash of their content, so that equal rows stay together, and neither the order
of rows nor that of paths matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from rlhf.data.sources.base import sha256


@dataclass(frozen=True)
class Keys:
    """Content keys of one data set, by the role its source gave them."""

    train: frozenset[str]
    held_out: frozenset[str]
    brings_held_out: bool


def draw(keys: Iterable[str], seed: int, purpose: str) -> list[str]:
    """Unique keys in an order that looks random but depends on nothing but seed and purpose."""
    return sorted(set(keys), key=lambda key: sha256(f"{seed}:{purpose}:{key}"))


def assign(
    sets: Sequence[Keys], shares: Sequence[float], eval_fraction: float, seed: int
) -> tuple[set[str], dict[str, int]]:
    """Held-out keys, and the step (1, 2, 3) of every training key.

    Each data set is cut at the rounded shares of its own unique keys. A key that several data sets
    have belongs to the first of them (callers order data sets by content), so steps stay disjoint.
    A data set without a held-out split of its own gives up `eval_fraction` of its keys.
    """
    held_out = set[str]().union(*(one.held_out for one in sets))
    for one in sets:
        if not one.brings_held_out:
            drawn = draw(one.train, seed, "held-out")
            held_out.update(drawn[: round(eval_fraction * len(drawn))])
    steps: dict[str, int] = {}
    for one in sets:
        own = draw(one.train - held_out - steps.keys(), seed, "step")
        bounds = [0, *(round(len(own) * s / sum(shares)) for s in accumulate(shares))]
        for step, (start, end) in enumerate(pairwise(bounds), 1):
            steps.update(dict.fromkeys(own[start:end], step))
    return held_out, steps
