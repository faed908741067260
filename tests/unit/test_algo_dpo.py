"""DPO's loss (ALGORITHM.md 39): by hand, as trl writes it, and by what its gradient does."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.algo.dpo import dpo_loss, implicit_rewards

ALL = torch.ones(2, dtype=torch.bool)


def loss_of(c: list[float], r: list[float], **how: object) -> float:
    found, _ = dpo_loss(torch.tensor(c), torch.tensor(r), ALL, **{"beta": 0.1, **how})  # type: ignore[arg-type]
    return float(found)


def test_by_hand() -> None:
    """Pairs with h = 1 and h = -2: softplus(-1) + softplus(2)."""
    right, wrong = math.log1p(math.exp(-1.0)), math.log1p(math.exp(2.0))
    assert loss_of([1.5, 0.0], [0.5, 2.0]) == pytest.approx(right + wrong, rel=1e-6)
    smoothed = 0.8 * right + 0.2 * math.log1p(math.exp(1.0))
    smoothed += 0.8 * wrong + 0.2 * math.log1p(math.exp(-2.0))
    assert loss_of([1.5, 0.0], [0.5, 2.0], label_smoothing=0.2) == pytest.approx(smoothed, rel=1e-6)
    # ipo, beta 0.1: (10 h - 5)^2
    assert loss_of([1.5, 0.0], [0.5, 2.0], kind="ipo") == pytest.approx(25.0 + 625.0, rel=1e-6)
    assert loss_of([0.0, 0.0], [0.0, 0.0]) == pytest.approx(2 * math.log(2), rel=1e-6)


def test_statistics_and_padding_pairs() -> None:
    chosen, rejected = torch.tensor([1.0, 2.0, 9.0, 3.0]), torch.tensor([0.0, 2.0, -9.0, 4.0])
    mask = torch.tensor([True, True, False, True])
    loss, stats = dpo_loss(chosen, rejected, mask, beta=1.0)
    alone, _ = dpo_loss(chosen[mask], rejected[mask], mask[mask], beta=1.0)
    assert float(loss) == pytest.approx(float(alone))
    told = {name: float(value) for name, value in stats.items()}
    assert told == {
        "pairs": 3.0, "correct": 1.5, "margin": 0.0, "chosen_reward": 6.0, "rejected_reward": 6.0,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm", "ipo"])
def test_the_formula_as_trl_writes_it(kind: str) -> None:
    """trl's DPOTrainer.dpo_loss: logits = (pi_c - pi_r) - (ref_c - ref_r), of means over tokens for
    ipo and sigmoid_norm."""
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 5) * 4 - 20, torch.randn(2, 5) * 4 - 20
    lengths = torch.randint(1, 30, (2, 5))
    beta = 0.3
    ours = implicit_rewards((policy - reference).flatten(), lengths.flatten(), beta, kind)
    found, _ = dpo_loss(*ours.view(2, 5), torch.ones(5, dtype=torch.bool), beta=beta, kind=kind)
    by = 1 if kind == "sigmoid" else lengths
    p, q = policy / by, reference / by
    logits = (p[0] - p[1]) - (q[0] - q[1])
    if kind == "ipo":
        wanted = (logits - 1 / (2 * beta)) ** 2
    else:
        wanted = -torch.nn.functional.logsigmoid(beta * logits)
    assert float(found) == pytest.approx(float(wanted.sum()), rel=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm", "ipo"])
def test_the_gradient_raises_chosen_and_lowers_rejected(kind: str) -> None:
    log_ratios = torch.zeros(4, requires_grad=True)
    rewards = implicit_rewards(log_ratios, torch.tensor([3, 5, 4, 2]), 0.1, kind)
    loss, _ = dpo_loss(rewards[:2], rewards[2:], ALL, beta=0.1, kind=kind)
    loss.backward()
    assert log_ratios.grad is not None
    assert (log_ratios.grad[:2] < 0).all()
    assert (log_ratios.grad[2:] > 0).all()


def test_an_unknown_loss() -> None:
    with pytest.raises(ValueError, match="use sigmoid, sigmoid_norm or ipo"):
        loss_of([0.0, 0.0], [0.0, 0.0], kind="hinge")
