"""Token choice by inverse CDF, its filters, and the log-probs it reports."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from rlhf.rollout.sampling import BLOCK, choose, draw


def test_draw_by_hand():
    """Weights 1, 0, 3: a quarter of the numbers give 0, the rest give 2, none gives 1."""
    weights = torch.tensor([[1.0, 0.0, 3.0]]).expand(5, 3)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.9, 1.0], dtype=torch.float64)
    assert draw(weights, uniform)[0].tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("width", [7, 2 * BLOCK, 2 * BLOCK + 1, 5 * BLOCK])
def test_draw_follows_the_weights(width):
    """An even grid of numbers gives each index its share of them, to within one."""
    torch.manual_seed(0)
    weights = torch.rand(1, width) ** 4
    weights[0, ::3] = 0
    count = 40_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    seen = torch.bincount(draw(weights.expand(count, -1), uniform)[0], minlength=width)
    expected = weights[0].double() / weights.double().sum() * count
    assert (seen - expected).abs().max() <= 1.05
    assert (seen[::3] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.sampled_from([1, 2, 40, 700, 1400]),
    u=st.sampled_from([0.0, 1e-300, 0.5, 1 - 2**-53, 1.0]) | st.floats(0, 1, exclude_max=True),
)
def test_draw_never_takes_weight_zero(seed, width, u):
    """At the extremes too, and with weights of very different sizes."""
    source = torch.Generator().manual_seed(seed)
    weights = torch.exp(12 * torch.randn(2, width, generator=source))
    weights = torch.where(torch.rand(2, width, generator=source) < 0.5, weights, 0.0)
    weights[:, seed % width] = 1.0
    picked, total = draw(weights, torch.full((2,), u, dtype=torch.float64))
    assert torch.allclose(total, weights.double().sum(1), rtol=1e-6)
    assert (weights.gather(1, picked[:, None]) > 0).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.5), (7, 1.0), (7, 0.5), (-1, 0.05), (99, 0.99)])
def test_filters_equal_transformers(top_k, top_p):
    """The reachable tokens and their probabilities are those of transformers' warpers."""
    torch.manual_seed(0)
    logits, count, temperature = torch.randn(1, 64) * 2, 20_000, 1.3
    warped = logits / temperature
    if top_k > 0:
        warped = TopKLogitsWarper(min(top_k, 64))(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, _ = choose(
        logits.expand(count, -1), uniform, temperature=temperature, top_k=top_k, top_p=top_p
    )
    share = torch.bincount(tokens, minlength=64) / count
    assert (share - warped.softmax(-1)[0]).abs().max() < 2 / count + 1e-5


def test_log_probs_ignore_filters_and_use_temperature():
    """ALGORITHM 14, 15: by hand, logits ln 1, ln 3, temperature 1 -> log 1/4, log 3/4; at
    temperature 0.5 -> log 1/10, log 9/10."""
    logits = torch.tensor([[1.0, 3.0]]).log()
    uniform = torch.tensor([0.999], dtype=torch.float64)
    for temperature, expected in ((1.0, 0.75), (0.5, 0.9)):
        token, log_prob = choose(logits, uniform, temperature=temperature, top_k=1)
        assert token.item() == 1
        assert log_prob.item() == pytest.approx(torch.tensor(expected).log().item(), abs=1e-6)


def test_half_precision_logits_are_computed_in_fp32():
    """ALGORITHM 33."""
    logits = (torch.randn(4, 1000) * 3).bfloat16()
    tokens, log_probs = choose(logits, torch.rand(4, dtype=torch.float64), temperature=0.9)
    exact = (logits.double() / 0.9).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert log_probs.dtype == torch.float32
    assert torch.allclose(log_probs.double(), exact, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_greedy_takes_the_first_maximum(temperature):
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 2.0]])
    uniform = torch.full((2,), 0.99, dtype=torch.float64)
    tokens, log_probs = choose(logits, uniform, temperature=temperature, top_k=2, top_p=0.1)
    assert tokens.tolist() == [1, 0]
    assert torch.allclose(log_probs, logits.log_softmax(-1)[[0, 1], [1, 0]])
