"""distinct-2 at an equal number of token pairs, exactly: no draws, no seed."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from rlhf.evaluation.intervals import Interval, jackknife, mapped

Pairs = Counter[tuple[int, int]]


class LogFactorials:
    """log n!, from a table that grows."""

    def __init__(self) -> None:
        self.table = [0.0]

    def __call__(self, n: int) -> float:
        while len(self.table) <= n:
            self.table.append(self.table[-1] + math.log(len(self.table)))
        return self.table[n]


_log_factorial = LogFactorials()


def distinct_2(answers: Sequence[list[int]]) -> float:
    """Different token pairs / all token pairs over all answers (Li et al. 2016).

    It falls with the number of tokens: compare models by `distinct_2_at` alone. 0 without pairs.
    """
    pairs = [pair for answer in answers for pair in itertools.pairwise(answer)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def pairs_by_prompt(keys: Sequence[Hashable], answers: Sequence[list[int]]) -> list[Pairs]:
    """Each prompt's token pairs with their counts; pairs do not cross answers."""
    groups: dict[Hashable, Pairs] = {}
    for key, answer in zip(keys, answers, strict=True):
        groups.setdefault(key, Counter()).update(itertools.pairwise(answer))
    return list(groups.values())


def distinct_2_at(prompts: Sequence[Pairs], drawn: int) -> tuple[float, list[float]]:
    """distinct-2 expected of `drawn` pairs out of all, and the same without each prompt in turn.

    The mean over all ways to draw them has a closed form: a pair that occurs n times among N is
    missed by drawing K with probability C(N - n, K) / C(N, K) (Hurlbert 1971, rarefaction).
    """
    total: Pairs = Counter()
    for pairs in prompts:
        total.update(pairs)
    size = sum(total.values())
    occurring = Counter(total.values())  # n -> how many different pairs occur n times
    found = _expected(occurring, size, drawn)
    without = []
    for pairs in prompts:
        changed = occurring.copy()
        for pair, n in pairs.items():
            changed[total[pair]] -= 1
            if total[pair] > n:
                changed[total[pair] - n] += 1
        without.append(_expected(changed, size - sum(pairs.values()), drawn))
    return found, without


def _expected(occurring: Counter[int], size: int, drawn: int) -> float:
    kept = size - drawn
    ways = _log_factorial(size) - _log_factorial(kept)
    seen = 0.0
    for n, different in occurring.items():
        missed = 0.0
        if n <= kept:
            log_missed = _log_factorial(size - n) - _log_factorial(kept - n) - ways
            missed = math.exp(log_missed)
        seen += different * (1 - missed)
    return seen / drawn


def equal_size(models: Sequence[Sequence[Pairs]]) -> int:
    """Half of the pairs of the model with fewest, or all it has without its longest prompt; 0: too
    few to compare. Of nearly all pairs, what a prompt adds depends on how many are left over, which
    makes the jackknife too wide."""
    sizes = [[sum(pairs.values()) for pairs in model] for model in models]
    return min(min(sum(one) // 2, sum(one) - max(one)) for one in sizes)


class Variety(NamedTuple):
    """distinct-2 of two models at an equal number of token pairs, and after / before."""

    before: float
    after: float
    ratio: Interval


def compare_variety(before: Sequence[Pairs], after: Sequence[Pairs]) -> Variety | None:
    """Prompt by prompt; the ratio's interval is a jackknife of its logarithm over prompts. None
    where answers are too short or too few."""
    drawn = equal_size([before, after])
    if drawn < 1:
        return None
    old, old_without = distinct_2_at(before, drawn)
    new, new_without = distinct_2_at(after, drawn)
    logs = [math.log(b / a) for a, b in zip(old_without, new_without, strict=True)]
    return Variety(old, new, mapped(jackknife(math.log(new / old), logs), math.exp))
