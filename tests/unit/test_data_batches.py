"""Batches and the plan of an epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.batches import (
    collate_pairs,
    collate_prompts,
    collate_sft,
    plan_batches,
    row_lengths,
)
from rlhf.data.plan import Budget, piece_sizes, pieces_needed, whole_pass
from tests.unit.data_help import SHARED, gpt2_like, needs_shared, run

PAD, EOS = 9, 2


def test_sft_labels() -> None:
    """ALGORITHM 1 and 3: -100 on prompt and pads, EOS counted; prompt loss by a setting."""
    rows = [
        {"prompt_ids": [5, 6], "answer_ids": [7, EOS]},
        {"prompt_ids": [5], "answer_ids": [EOS]},
    ]
    batch = collate_sft(rows, PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, EOS], [5, EOS, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.labels.tolist() == [[-100, -100, 7, EOS], [-100, EOS, -100, -100]]
    whole = collate_sft(rows, PAD, prompt_loss=True)
    assert whole.labels.tolist() == [[5, 6, 7, EOS], [5, EOS, -100, -100]]
    assert (batch.input_ids.dtype, batch.attention_mask.dtype) == (torch.int64, torch.bool)


def test_an_eos_in_the_prompt_is_no_label() -> None:
    """ALGORITHM 3: masks go by place, not by token (OPT begins with its eos)."""
    batch = collate_sft([{"prompt_ids": [EOS, 5], "answer_ids": [7, EOS]}], EOS)
    assert batch.labels.tolist() == [[-100, -100, 7, EOS]]


def test_pairs_are_in_one_forward() -> None:
    """ALGORITHM 6 and 8: chosen above rejected, the last real token of each."""
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, EOS], "rejected_ids": [EOS], "margin": 0.5},
        {"prompt_ids": [4], "chosen_ids": [8], "rejected_ids": [7, 7, 7], "margin": 0.0},
    ]
    batch = collate_pairs(rows, PAD)
    assert batch.input_ids.tolist() == [
        [5, 6, 7, EOS],
        [4, 8, PAD, PAD],
        [5, 6, EOS, PAD],
        [4, 7, 7, 7],
    ]
    assert batch.answer_mask.int().tolist() == [
        [0, 0, 1, 1],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 1, 1, 1],
    ]
    assert batch.attention_mask.sum(1).tolist() == [4, 2, 3, 4]
    assert batch.last.tolist() == [3, 1, 2, 3]
    assert (batch.margin.tolist(), batch.pair_mask.tolist()) == ([0.5, 0.0], [True, True])


def test_prompts_are_padded_on_the_left() -> None:
    """ALGORITHM 13."""
    rows = [{"prompt_ids": [5, 6, 7], "prompt": "a"}, {"prompt_ids": [4], "prompt": "b"}]
    batch = collate_prompts(rows, PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7], [PAD, PAD, 4]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.prompts == ["a", "b"]
    assert collate_prompts([], PAD).input_ids.shape == (0, 0)


def test_an_idle_rank_gets_a_row_that_counts_for_nothing() -> None:
    """ALGORITHM 30: an empty micro-batch can go through the model and adds nothing."""
    sft, pairs = collate_sft([], PAD), collate_pairs([], PAD)
    assert (sft.labels == -100).all()
    assert sft.attention_mask.all()
    assert pairs.input_ids.shape == (2, 2)
    assert not pairs.pair_mask.any()


def test_to_device() -> None:
    """Tensors move, texts stay."""
    batch = collate_prompts([{"prompt_ids": [5], "prompt": "a"}], PAD).to("meta")
    assert batch.input_ids.device.type == "meta"
    assert batch.prompts == ["a"]


plans = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 24),
        "micro_batch_size": st.integers(1, 9),
        "seed": st.integers(0, 2**31 - 1),
        "epoch": st.integers(0, 9),
    }
)
row_sets = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 12)), max_size=90)


def _ranks(rows: list[tuple[int, int]], world: int, grouped: bool, plan: dict[str, int]) -> Any:
    lengths = [length for length, _ in rows]
    groups = [group for _, group in rows] if grouped else None
    return [
        plan_batches(lengths, rank=rank, world_size=world, groups=groups, **plan)
        for rank in range(world)
    ]


@settings(max_examples=120, deadline=None)
@given(row_sets, plans, st.booleans())
def test_plan(rows: list[tuple[int, int]], plan: dict[str, int], grouped: bool) -> None:
    """ALGORITHM 8 and 30: every row once; the same global batches for 1, 2 and 4 ranks and other
    micro-batches; as many micro-batches on every rank; groups of up to a quarter of a batch stay
    together."""
    reference: list[set[int]] | None = None
    for world in (1, 2, 4):
        ranks = _ranks(rows, world, grouped, plan)
        assert len({len(rank) for rank in ranks}) == 1
        batches = []
        for steps in zip(*ranks, strict=True):
            assert len({len(micros) for micros in steps}) == 1
            dealt = [micro for micros in steps for micro in micros]
            assert all(len(micro) <= plan["micro_batch_size"] for micro in dealt)
            sizes = [len(micro) for micro in dealt]
            assert max(sizes) - min(sizes) <= 1
            flat = [row for micro in dealt for row in micro]
            assert 0 < len(flat) == len(set(flat)) <= plan["batch_size"]
            batches.append(set(flat))
        assert Counter(row for batch in batches for row in batch) == Counter(range(len(rows)))
        reference = reference or batches
        assert batches == reference
    other = _ranks(rows, 1, grouped, {**plan, "micro_batch_size": 3})
    assert [{row for micro in step for row in micro} for step in other[0]] == (reference or [])
    if grouped:
        sizes_by_group = Counter(group for _, group in rows)
        for group, size in sizes_by_group.items():
            homes = sum(any(rows[row][1] == group for row in batch) for batch in reference or [])
            if size <= plan["batch_size"] // 4:
                assert homes == 1
    elif rows:
        assert len(reference or []) == -(-len(rows) // plan["batch_size"])


@settings(max_examples=40, deadline=None)
@given(row_sets, plans)
def test_steps_per_epoch_never_change(rows: list[tuple[int, int]], plan: dict[str, int]) -> None:
    """The learning rate schedule needs the number of steps before the first epoch."""
    counts = {
        len(_ranks(rows, 1, True, {**plan, "seed": seed, "epoch": epoch})[0])
        for seed in (1, 2)
        for epoch in (0, 1, 2)
    }
    assert len(counts) == 1


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_whole_pass(lengths: list[int], micro: int, world: int) -> None:
    """ALGORITHM 30, evaluation: every row once over the ranks, as many micro-batches on each."""
    ranks = [
        whole_pass(lengths, micro_batch_size=micro, rank=rank, world_size=world)
        for rank in range(world)
    ]
    rows = [row for rank in ranks for batch in rank for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(batch) <= micro for rank in ranks for batch in rank)


def test_epochs_and_seeds_differ() -> None:
    """Rows are shuffled by seed and epoch, and reproducibly."""
    plan = {"batch_size": 8, "micro_batch_size": 8}
    rows = [(1, i // 2) for i in range(64)]
    for grouped in (False, True):
        one, two, three, again = (
            _ranks(rows, 1, grouped, {**plan, "seed": seed, "epoch": epoch})
            for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
        )
        assert one == again
        assert one != two
        assert one != three


def test_micro_batches_hold_similar_lengths() -> None:
    """By hand: 2 ranks, micro-batches of 2: rows of neighbouring length together, longest first."""
    plan = {"batch_size": 8, "micro_batch_size": 2, "seed": 0, "epoch": 0}
    lengths = [3, 8, 1, 6, 7, 2, 5, 4]
    ranks = _ranks([(length, 0) for length in lengths], 2, False, plan)
    by_length = [
        [[[lengths[row] for row in micro] for micro in step] for step in rank] for rank in ranks
    ]
    assert by_length == [[[[8, 7], [4, 3]]], [[[6, 5], [2, 1]]]]


def test_groups_that_do_not_fit_open_one_more_batch() -> None:
    """ALGORITHM 8: 16 prompts of 3 pairs in batches of 16: five prompts fit, so four batches."""
    rows = [(1, i // 3) for i in range(48)]
    plan = {"batch_size": 16, "micro_batch_size": 16, "seed": 0, "epoch": 0}
    (steps,) = _ranks(rows, 1, True, plan)
    assert sorted(len(step[0]) for step in steps) == [3, 15, 15, 15]
    assert all(set(Counter(row // 3 for row in step[0]).values()) == {3} for step in steps)


def test_pairs_of_one_prompt_share_a_batch() -> None:
    """ALGORITHM 8: 100 prompts with 4 pairs each, batches of 16."""
    rows = [(1, i // 4) for i in range(400)]
    plan = {"batch_size": 16, "micro_batch_size": 16, "seed": 0, "epoch": 0}
    (steps,) = _ranks(rows, 1, True, plan)
    assert len(steps) == 25
    for (micro,) in steps:
        assert sorted(Counter(row // 4 for row in micro).values()) == [4, 4, 4, 4]


@needs_shared("movie_sentiment")
@pytest.mark.parametrize("batch_size", [16, 32])
def test_twenty_prompts_still_mix(batch_size: int, tmp_path: Path) -> None:
    """ALGORITHM 8 on real data: 1,600 pairs of only 20 prompts are not kept together."""
    path = SHARED / "movie_sentiment"
    data = run(path, gpt2_like(), tmp_path, max_prompt_length=100, max_length=600)
    lengths, groups = row_lengths(data.dataset), list(data.dataset["prompt_key"])
    assert len(set(groups)) == 20
    row = data.dataset[3]
    longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    assert lengths[3] == len(row["prompt_ids"]) + longest
    plan = {"batch_size": batch_size, "micro_batch_size": 8, "rank": 0, "world_size": 1}
    steps = plan_batches(lengths, seed=0, epoch=0, groups=groups, **plan)
    assert len(steps) == -(-len(lengths) // batch_size)
    distinct = [len({groups[row] for micro in step for row in micro}) for step in steps]
    assert sum(distinct) / len(distinct) > 8


def test_pieces_by_hand() -> None:
    """At most 20 tokens (rows x longest) and 4 rows; 30 is over the limit and goes alone."""
    lengths = [30, 10, 9, 5, 5, 4, 3, 3, 2, 1]
    budget = Budget(rows=4, tokens=20)
    assert pieces_needed(lengths, budget) == 4
    assert piece_sizes(lengths, budget, 4) == [1, 2, 4, 3]
    assert piece_sizes(lengths, budget, 5) == [1, 1, 1, 4, 3], "the fullest (2 x 10) is halved"
    assert piece_sizes([4, 2], budget, 3) == [1, 1, 0]
    assert piece_sizes(lengths, Budget(4), 3) == [4, 3, 3]
    with pytest.raises(ValueError, match="4 are needed"):
        piece_sizes(lengths, budget, 3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(1, 120)),
    st.integers(1, 4),
)
def test_a_token_budget_is_kept(
    lengths: list[int], rows: int, tokens: int | None, world: int
) -> None:
    """30: every row once over the ranks, as many micro-batches on each, none over the budget."""
    parts = [
        plan_batches(
            lengths,
            batch_size=16,
            micro_batch_size=Budget(rows, tokens),
            rank=rank,
            world_size=world,
            seed=1,
            epoch=0,
        )
        for rank in range(world)
    ]
    seen = [row for part in parts for step in part for piece in step for row in piece]
    assert sorted(seen) == list(range(len(lengths)))
    for steps in zip(*parts, strict=True):
        assert len({len(step) for step in steps}) == 1
        for piece in (piece for step in steps for piece in step):
            assert len(piece) <= rows
            if tokens is not None and len(piece) > 1:
                assert len(piece) * max(lengths[row] for row in piece) <= tokens
