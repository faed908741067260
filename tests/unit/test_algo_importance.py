"""Truncated importance weights, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.algo.importance import importance_weights, sampler_gap

MASK = torch.tensor([[True, True, True, False]])
OURS = torch.tensor([[0.5, 0.2, 0.9, 0.3]]).log()
THEIRS = torch.tensor([[0.4, 0.4, 0.1, 0.0]]).log()


def test_weights_by_hand():
    """0.5/0.4, 0.2/0.4, 0.9/0.1 capped at 2; what does not count is 1, even over zero."""
    weights = importance_weights(OURS, THEIRS, MASK, cap=2.0)
    assert torch.allclose(weights, torch.tensor([[1.25, 0.5, 2.0, 1.0]]))


def test_gap_by_hand():
    gap = sampler_gap(OURS, THEIRS, MASK)
    expected = torch.tensor([[math.log(1.25), math.log(0.5), math.log(9), 0.0]])
    assert torch.allclose(gap, expected)


def test_equal_engines_change_nothing():
    assert torch.equal(importance_weights(OURS, OURS, MASK, cap=1.0), torch.ones(1, 4))


def test_it_makes_the_policy_gradient_right_on_average():
    """Tokens of q, weighted by p / q, have the mean of f under p; unweighted they do not."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    f = torch.tensor([1.0, -2.0, 5.0])
    tokens = torch.arange(3)[None]
    weights = importance_weights(p.log()[tokens], q.log()[tokens], tokens >= 0, cap=10.0)
    assert float((q * weights[0] * f).sum()) == pytest.approx(float((p * f).sum()), abs=1e-6)
    assert float((q * f).sum()) != pytest.approx(float((p * f).sum()), abs=0.1)


def test_no_gradient_flows_into_the_weights():
    ours = OURS.clone().requires_grad_()
    assert not importance_weights(ours, THEIRS, MASK, cap=2.0).requires_grad


def test_a_cap_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        importance_weights(OURS, THEIRS, MASK, cap=0.5)
