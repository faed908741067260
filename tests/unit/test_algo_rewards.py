"""Scores to token rewards, and where things sit in a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.algo.masking import (
    last_counted,
    masked_mean,
    masked_sum,
    score_at_end,
    states_before_answer,
)
from rlhf.algo.rewards import missing_eos, normalize_and_clip_scores, token_rewards

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()


def test_token_rewards_by_hand() -> None:
    """ALGORITHM 21: -beta (logp - ref) on each answer token, score on the last counted one."""
    log_probs = torch.tensor([[-1.0, -2.0, -3.0, 9.0]])
    reference = torch.tensor([[-2.0, -2.0, -1.0, -9.0]])
    rewards = token_rewards(torch.tensor([4.0]), log_probs, reference, MASK[:1], kl_coef=0.1)
    assert rewards.tolist() == [pytest.approx([-0.1, 0.0, 0.2 + 4.0, 0.0])]


def test_score_is_placed_once_and_empty_rows_are_zero() -> None:
    """ALGORITHM 21: also with holes; NaN beyond the mask or in an empty row's score stays out."""
    scores = torch.tensor([1.0, 2.0, torch.nan, 4.0])
    log_probs = torch.where(MASK, 0.0, torch.nan)
    rewards = token_rewards(scores, log_probs, log_probs, MASK, kl_coef=0.5)
    assert rewards.tolist() == [[0, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 4]]


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_sum_is_score_minus_kl(seed: int, coef: float) -> None:
    """ALGORITHM 21, 22: a row's rewards add up to score - coef * KL of the answer."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (-torch.rand(3, 6, generator=generator) for _ in range(2))
    mask = torch.arange(6) < torch.randint(1, 7, (3, 1), generator=generator)
    scores = torch.randn(3, generator=generator)
    rewards = token_rewards(scores, p, q, mask, coef)
    for row in range(3):
        n = int(mask[row].sum())
        kl = sum((p[row, t] - q[row, t]).item() for t in range(n))
        assert rewards[row].sum().item() == pytest.approx(scores[row].item() - coef * kl, abs=1e-5)
        assert rewards[row, n:].eq(0).all()


def test_scores_are_normalised_then_clipped() -> None:
    """ALGORITHM 10, 23: (score - mean) / std, then +-5; bfloat16 comes out as float32."""
    scores = torch.tensor([3.0, -20.0, 20.0]).bfloat16()
    shaped = normalize_and_clip_scores(scores, mean=1.0, std=2.0, clip=5.0)
    assert shaped.tolist() == [1.0, -5.0, 5.0]
    assert shaped.dtype == torch.float32
    with pytest.raises(ValueError, match=r"std 0\.0"):
        normalize_and_clip_scores(scores, 0.0, 0.0, 5.0)
    with pytest.raises(ValueError, match="std nan"):
        normalize_and_clip_scores(scores, 0.0, float("nan"), 5.0)


def test_clip_comes_before_the_kl() -> None:
    """ALGORITHM 23: a KL term below -5 reaches the reward unclipped."""
    score = normalize_and_clip_scores(torch.tensor([100.0]), clip=5.0)
    rewards = token_rewards(
        score, torch.tensor([[0.0]]), torch.tensor([[-80.0]]), MASK[1:2, :1], kl_coef=0.5
    )
    assert rewards.item() == pytest.approx(5.0 - 40.0)


def test_missing_eos() -> None:
    """ALGORITHM 17: no EOS, score minus the penalty."""
    ended = torch.tensor([True, False])
    assert missing_eos(torch.tensor([0.5, 0.5]), ended, 1.0).tolist() == [0.5, -0.5]


def test_last_counted_and_score_at_end() -> None:
    """ALGORITHM 6: the score is read at the last real token; padding on either side is skipped."""
    assert last_counted(MASK).nonzero().tolist() == [[0, 2], [1, 0], [3, 3]]
    values = torch.arange(16.0).view(4, 4).requires_grad_()
    at_end = score_at_end(values, MASK)
    assert at_end.tolist() == [2.0, 4.0, 0.0, 15.0]
    at_end.sum().backward()
    assert values.grad is not None
    assert values.grad.nonzero().tolist() == [[0, 2], [1, 0], [3, 3]]


def test_states_before_answer() -> None:
    """ALGORITHM 25: V_t is the value before token t, the slice start-1 : end-1."""
    x = torch.arange(14).view(2, 7)
    assert states_before_answer(x, 4).tolist() == [[3, 4, 5], [10, 11, 12]]
    assert states_before_answer(x.unsqueeze(-1), 7).shape == (2, 0, 1)
    for bad in (0, 8):
        with pytest.raises(ValueError, match=f"prompt_length {bad}"):
            states_before_answer(x, bad)


def test_masked_sums() -> None:
    """Nothing counted: 0, never NaN; shapes are not broadcast."""
    x = torch.tensor([[1.0, 2.0, torch.inf, torch.nan]])
    assert masked_sum(x, torch.tensor([[True, True, False, False]])).item() == 3.0
    assert masked_mean(x, torch.tensor([[True, True, False, False]])).item() == 1.5
    assert masked_mean(x, torch.zeros(1, 4).bool()).item() == 0.0
    with pytest.raises(ValueError, match=r"x has shape \(1, 4\), the mask has \(2, 4\)"):
        masked_sum(x, torch.ones(2, 4).bool())
    with pytest.raises(ValueError, match="scores has shape"):
        token_rewards(torch.zeros(3), x, x, torch.ones(1, 4).bool(), 0.1)
