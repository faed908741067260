"""GAE against a plain loop, whitening over ranks, and group baselines."""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algo.advantages import (
    discounted_returns,
    discounted_sums,
    explained_variance,
    gae,
    group_advantages,
    leave_one_out,
    whiten,
)
from rlhf.algo.masking import AllReduce, masked_moments


def naive_gae(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """The textbook loop, over one answer's counted tokens, in Python floats."""
    advantages, ahead = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        following = values[t + 1] if t + 1 < len(values) else 0.0
        ahead = rewards[t] + gamma * following - values[t] + gamma * lam * ahead
        advantages[t] = ahead
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def on_ranks(count: int, work: Callable[[int, AllReduce], Tensor]) -> list[Tensor]:
    """Run work(rank, all_reduce) in `count` threads whose all_reduce really sums over them."""
    barrier, parts = threading.Barrier(count, timeout=20), [torch.empty(0)] * count
    results = [torch.empty(0)] * count

    def run(rank: int) -> None:
        def all_reduce(x: Tensor) -> Tensor:
            parts[rank] = x
            barrier.wait()
            total = sum(parts[1:], parts[0].clone())
            barrier.wait()
            return total

        results[rank] = work(rank, all_reduce)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_gae_by_hand() -> None:
    """ALGORITHM 25, 26: three tokens, gamma 0.5, lambda 0.5; garbage past the end is ignored."""
    rewards = torch.tensor([[1.0, 0.0, 2.0, 99.0]])
    values = torch.tensor([[1.0, 2.0, 4.0, 77.0]])
    mask = torch.tensor([[True, True, True, False]])
    # delta_2 = 2 - 4 = -2; delta_1 = 0 + 0.5*4 - 2 = 0; delta_0 = 1 + 0.5*2 - 1 = 1
    # A_2 = -2; A_1 = 0 + 0.25*-2 = -0.5; A_0 = 1 + 0.25*-0.5 = 0.875
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[0.875, -0.5, -2.0, 0.0]]
    assert returns.tolist() == [[1.875, 1.5, 2.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(0, 40),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    holes=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gae_equals_the_loop(width: int, gamma: float, lam: float, holes: bool, seed: int) -> None:
    """ALGORITHM 25, 26: any length and mask; uncounted positions act as if they were absent."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 5, width, generator=generator).unbind()
    if holes:
        mask = torch.rand(5, width, generator=generator) < 0.5
    else:
        mask = torch.arange(width) < torch.randint(0, width + 1, (5, 1), generator=generator)
    off = torch.where(mask, 0.0, torch.nan)  # must not leak
    advantages, returns = gae(rewards + off, values + off, mask, gamma, lam)
    for row in range(5):
        keep = mask[row]
        a, r = naive_gae(rewards[row, keep].tolist(), values[row, keep].tolist(), gamma, lam)
        assert advantages[row, keep].tolist() == pytest.approx(a, abs=1e-5)
        assert returns[row, keep].tolist() == pytest.approx(r, abs=1e-5)
    assert advantages[~mask].eq(0).all()
    assert returns[~mask].eq(0).all()


def test_gae_long_answer() -> None:
    """Thousands of tokens, gamma = lambda = 1 included, where error would pile up."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 1, 4097, generator=generator).unbind()
    mask = torch.ones(1, 4097, dtype=torch.bool)
    for gamma, lam in ((1.0, 0.95), (1.0, 1.0), (0.99, 0.5)):
        advantages, _ = gae(rewards, values, mask, gamma, lam)
        a, _ = naive_gae(rewards[0].tolist(), values[0].tolist(), gamma, lam)
        assert advantages[0].tolist() == pytest.approx(a, abs=2e-4)


def test_gae_limits() -> None:
    """lambda 1: A = return - V; lambda 0: A = delta. bfloat16 in, float32 out (33)."""
    rewards = torch.tensor([[0.0, 0.0, 3.0]]).bfloat16()
    values = torch.tensor([[1.0, 2.0, 4.0]]).bfloat16()
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    assert returns.tolist() == [[3.0, 3.0, 3.0]]
    assert advantages.dtype == returns.dtype == torch.float32
    assert gae(rewards, values, mask, 1.0, 0.0)[0].tolist() == [[1.0, 2.0, -1.0]]


def test_discounted_returns_by_hand() -> None:
    """ALGORITHM 37: R_t = sum of gamma^k r_{t+k} over the answer, holes skipped."""
    rewards = torch.tensor([[1.0, 5.0, 2.0, 4.0, 9.0], [7.0] * 5])
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    assert discounted_returns(rewards, mask, 0.5).tolist() == [[3, 0, 4, 4, 0], [0] * 5]
    assert discounted_sums(torch.ones(1, 5), 1.0).tolist() == [[5, 4, 3, 2, 1]]
    assert discounted_sums(torch.ones(1, 5), 0.0).tolist() == [[1] * 5]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shift=st.floats(-100, 100),
    cut=st.integers(0, 6),
)
def test_whitening_over_ranks(seed: int, shift: float, cut: int) -> None:
    """ALGORITHM 27: two ranks' whitened rows equal one rank's, wherever the batch is cut."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, generator=generator) * 3 + shift
    mask = torch.rand(6, 5, generator=generator) < 0.6
    mask[0, :2] = True
    whole = whiten(x, mask)
    parts = [(x[:cut], mask[:cut]), (x[cut:], mask[cut:])]
    results = on_ranks(2, lambda rank, all_reduce: whiten(*parts[rank], all_reduce))
    torch.testing.assert_close(torch.cat(results), whole, atol=1e-6, rtol=1e-6)
    counted = whole[mask].tolist()
    assert statistics.fmean(counted) == pytest.approx(0, abs=1e-5)
    assert statistics.pstdev(counted) == pytest.approx(1, abs=1e-5)
    assert whole[~mask].eq(0).all()


def test_whitening_by_hand() -> None:
    """ALGORITHM 27: biased variance, eps 1e-8: (1, 3) -> (-1, 1); masked NaN stays out."""
    x = torch.tensor([[1.0, torch.nan, 3.0]])
    assert whiten(x, torch.tensor([[True, False, True]])).tolist() == [pytest.approx([-1, 0, 1])]
    tiny = torch.tensor([[1e-4, -1e-4]])  # var 1e-8 = eps: divided by sqrt(2e-8)
    expected = 1 / math.sqrt(2)
    assert whiten(tiny, torch.ones(1, 2).bool()).tolist() == [
        pytest.approx([expected, -expected], rel=1e-5)
    ]


def test_whitening_without_spread_is_zero() -> None:
    """ALGORITHM 27: equal values, one value or none give 0, not noise and not NaN."""
    for mask in (torch.ones(3, 7).bool(), torch.zeros(3, 7).bool(), torch.eye(3, 7).bool()):
        assert whiten(torch.full((3, 7), 100.1), mask).eq(0).all()
    one = torch.zeros(3, 7).bool()
    one[1, 2] = True
    assert whiten(torch.randn(3, 7), one).eq(0).all()
    count, mean, var = masked_moments(torch.zeros(0, 7), torch.zeros(0, 7).bool())
    assert (count.item(), mean.item(), var.item()) == (0, 0, 0)


def test_group_advantages_by_hand() -> None:
    """ALGORITHM 37: GRPO's (score - mean) / std with the unbiased std, and without."""
    scores = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    normal = group_advantages(scores, 3)
    assert normal.tolist() == pytest.approx([-1, 0, 1, 0, 0, 0], abs=1e-5)
    wide = torch.tensor([0.0, 0.0, 6.0])  # mean 2, unbiased std sqrt(12)
    assert group_advantages(wide, 3).tolist() == pytest.approx(
        [-2 / math.sqrt(12), -2 / math.sqrt(12), 4 / math.sqrt(12)], rel=1e-5
    )
    assert group_advantages(wide, 3, use_std=False).tolist() == [-2.0, -2.0, 4.0]


def test_leave_one_out_by_hand() -> None:
    """ALGORITHM 37: RLOO's baseline is the mean of the others."""
    scores = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    assert leave_one_out(scores, 3).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=12, max_size=12), st.sampled_from([2, 3, 4])
)
def test_group_baselines_against_python(scores: list[float], n: int) -> None:
    """ALGORITHM 37: both against the statistics module, group by group."""
    grpo = group_advantages(torch.tensor(scores), n).tolist()
    rloo = leave_one_out(torch.tensor(scores), n).tolist()
    for start in range(0, 12, n):
        group = scores[start : start + n]
        mean, std = statistics.fmean(group), statistics.stdev(group)
        for i, score in enumerate(group):
            others = group[:i] + group[i + 1 :]
            assert grpo[start + i] == pytest.approx((score - mean) / (std + 1e-6), abs=1e-4)
            assert rloo[start + i] == pytest.approx(score - statistics.fmean(others), abs=1e-3)


def test_groups_leave_out_rows_that_do_not_count() -> None:
    """A row without a counted token shifts no baseline, even if its score is NaN."""
    scores = torch.tensor([1.0, 3.0, torch.nan, 8.0, torch.nan, torch.nan])
    valid = torch.tensor([True, True, False, True, False, False])
    assert group_advantages(scores, 3, False, valid).tolist() == [-1, 1, 0, 0, 0, 0]
    assert leave_one_out(scores, 3, valid).tolist() == [-2, 2, 0, 0, 0, 0]
    assert group_advantages(scores, 3, True, valid).isfinite().all()


@given(st.floats(-1e3, 1e3, width=32), st.integers(1, 12))
def test_equal_scores_give_exactly_nothing(score: float, n: int) -> None:
    """ALGORITHM 37: rounding in the mean must not be blown up by a std of 0."""
    scores = torch.full((n,), score)
    assert group_advantages(scores, n).eq(0).all()
    assert leave_one_out(scores, n).eq(0).all()


def test_group_refusals() -> None:
    """Rows that do not divide into groups are an error, not a silent reshuffle."""
    for function in (group_advantages, leave_one_out):
        with pytest.raises(ValueError, match="5 scores do not divide into groups of 2"):
            function(torch.zeros(5), 2)


def test_explained_variance() -> None:
    """1 for perfect values, 0 for a constant offset's complement, 0 where nothing varies."""
    returns = torch.tensor([[1.0, 2.0, 3.0, torch.nan]])
    mask = torch.tensor([[True, True, True, False]])
    assert explained_variance(returns, returns, mask).item() == pytest.approx(1)
    assert explained_variance(torch.zeros(1, 4), returns, mask).item() == pytest.approx(0)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(1 - 4)
    half = torch.tensor([[1.0, 2.0, 2.0, 0.0]])  # residuals 0, 0, 1: var 2/9 of 6/9
    assert explained_variance(half, returns, mask).item() == pytest.approx(1 - 2 / 6)
    assert explained_variance(half, torch.ones(1, 4), mask).item() == 0
    assert explained_variance(half, returns, torch.zeros(1, 4).bool()).item() == 0
    parts = on_ranks(
        2,
        lambda rank, all_reduce: explained_variance(
            half[:, rank::2], returns[:, rank::2], mask[:, rank::2], all_reduce
        ),
    )
    assert [part.item() for part in parts] == pytest.approx([1 - 2 / 6] * 2)


def test_shapes_are_not_broadcast() -> None:
    """A (B, 1) tensor among (B, A) ones is a mistake, and said so."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="values has shape"):
        gae(torch.zeros(2, 3), torch.zeros(2, 1), mask, 1.0, 0.95)
    with pytest.raises(ValueError, match="x has shape"):
        whiten(torch.zeros(3), mask)
