"""Which rows meet in which optimiser step, rank and micro-batch.

The global batches come from the seed, the epoch and the groups alone. Ranks and micro-batches only
cut them up, so 1 x 8 and 4 x 2 see the same rows in the same order of steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A prompt with more pairs than this share of a batch is not kept together: few prompts with many
# pairs each (twenty prompts for 4,000 pairs, say) would otherwise leave no shuffling.
GROUP_SHARE = 4


@dataclass(frozen=True)
class Budget:
    """What one forward pass may hold: rows, and tokens (rows x longest row) if they are limited."""

    rows: int
    tokens: int | None = None

    @classmethod
    def of(cls, value: int | Budget) -> Budget:
        return value if isinstance(value, Budget) else cls(value)


def pieces_needed(lengths: Sequence[int], budget: Budget) -> int:
    """The fewest micro-batches within the budget; `lengths` in descending order."""
    return len(_filled(lengths, budget)) if budget.tokens else -(-len(lengths) // budget.rows)


def piece_sizes(lengths: Sequence[int], budget: Budget, pieces: int) -> list[int]:
    """Rows of each of `pieces` micro-batches, within the budget; `lengths` in descending order.

    Without a token limit: as even as possible. With one: each is filled up, long rows with long
    rows, and the fullest are halved until there are enough. A row over the limit is alone. Where
    there are fewer rows than pieces the last ones are empty.

    Raises:
        ValueError: fewer pieces than `pieces_needed`.
    """
    least = pieces_needed(lengths, budget)
    if pieces < least:
        raise ValueError(f"{pieces} micro-batches are too few, {least} are needed")
    if budget.tokens is None:
        return [len(part) for part in np.array_split(np.arange(len(lengths)), pieces)]
    sizes = _filled(lengths, budget)
    while len(sizes) < min(pieces, len(lengths)):
        starts = np.cumsum([0, *sizes[:-1]])
        work = [size * lengths[i] if size > 1 else 0 for i, size in zip(starts, sizes, strict=True)]
        fullest = int(np.argmax(work))
        half = sizes[fullest] // 2
        sizes[fullest : fullest + 1] = [half, sizes[fullest] - half]
    return sizes + [0] * (pieces - len(sizes))


def _filled(lengths: Sequence[int], budget: Budget) -> list[int]:
    sizes: list[int] = []
    start = 0
    while start < len(lengths):
        fitting = (budget.tokens or 0) // max(lengths[start], 1)
        sizes.append(min(max(fitting, 1), budget.rows, len(lengths) - start))
        start += sizes[-1]
    return sizes


def row_order(count: int, seed: int, epoch: int) -> list[int]:
    """An epoch's permutation of so many rows."""
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    return order


def plan_batches(
    lengths: Sequence[int],
    *,
    batch_size: int,
    micro_batch_size: int | Budget,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    groups: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """This rank's part of one epoch: optimiser steps -> micro-batches -> row numbers.

    Every row occurs once per epoch over all ranks. All ranks have the same number of micro-batches
    in a step; one may be empty. Within a step rows are sorted by length (longest first) and cut
    into micro-batches, of nearly equal size or by a token limit (`piece_sizes`), which are dealt to
    the ranks in turn.

    With `groups` (one number per row, equal for rows of one prompt), rows of a group share a global
    batch if the group has at most batch_size / 4 rows; larger groups are spread like single rows.
    Batches are then filled evenly, some a little under batch_size. The number of steps does not
    depend on the epoch or the seed.
    """
    order = row_order(len(lengths), seed, epoch)
    if groups is None:
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    else:
        # A column of a data set is slow to read item by item.
        batches = _grouped(order, list(groups), batch_size, seed, epoch)
    return [deal(batch, lengths, micro_batch_size, rank, world_size) for batch in batches]


def _grouped(
    order: list[int], groups: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Largest units first, each into the emptiest batch (longest-processing-time rule); one more
    batch is opened when a unit fits nowhere. Only sizes decide, so the count is always the same."""
    by_group: dict[int, list[int]] = {}
    for row in order:
        by_group.setdefault(groups[row], []).append(row)
    units: list[list[int]] = []
    for rows in by_group.values():
        together = len(rows) <= batch_size // GROUP_SHARE
        units.extend([rows] if together else [[row] for row in rows])
    rng = np.random.default_rng([seed, epoch, 1])
    shuffled = [units[i] for i in rng.permutation(len(units))]
    batches: list[list[int]] = [[] for _ in range(-(-len(order) // batch_size))]
    emptiest = [(0, number) for number in range(len(batches))]
    for unit in sorted(shuffled, key=len, reverse=True):
        load, number = heapq.heappop(emptiest)
        if load + len(unit) > batch_size:
            heapq.heappush(emptiest, (load, number))
            load, number = 0, len(batches)
            batches.append([])
        batches[number].extend(unit)
        heapq.heappush(emptiest, (load + len(unit), number))
    return [batches[i] for i in rng.permutation(len(batches))]


def deal(
    batch: Sequence[int],
    lengths: Sequence[int],
    micro_batch_size: int | Budget,
    rank: int,
    world_size: int,
) -> list[list[int]]:
    """This rank's micro-batches of a global batch's rows: as many on every rank, some may be empty.

    Rows are sorted by length (longest first), cut up, and the pieces dealt to the ranks in turn.
    """
    if not batch:
        return []
    budget = Budget.of(micro_batch_size)
    rows = sorted(batch, key=lambda row: (-lengths[row], row))
    found = [lengths[row] for row in rows]
    pieces = -(-pieces_needed(found, budget) // world_size) * world_size
    ends = np.cumsum(piece_sizes(found, budget, pieces)).tolist()
    cut = [rows[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return cut[rank::world_size]


def whole_pass(
    lengths: Sequence[int], *, micro_batch_size: int | Budget, rank: int, world_size: int
) -> list[list[int]]:
    """Every row once over all ranks, for evaluation: this rank's micro-batches of row numbers."""
    return deal(list(range(len(lengths))), lengths, micro_batch_size, rank, world_size)
