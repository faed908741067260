"""KL estimators and controllers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algo.kl import ESTIMATORS, AdaptiveKL, FixedKL, build_kl_controller, kl_estimate
from rlhf.algo.losses import kl_loss, policy_loss
from rlhf.algo.rewards import token_rewards


def test_hand_computed() -> None:
    """ALGORITHM 22: p = 1/2 against q = 1/4, and the reverse."""
    p, q = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    ln2 = math.log(2)
    assert kl_estimate(p, q, "k1").tolist() == pytest.approx([ln2, -ln2])
    assert kl_estimate(p, q, "k2").tolist() == pytest.approx([ln2**2 / 2] * 2)
    assert kl_estimate(p, q, "k3").tolist() == pytest.approx([0.5 - 1 + ln2, 2 - 1 - ln2])


def test_expectations_are_the_kl() -> None:
    """ALGORITHM 22: under the policy, k1 and k3 have the exact KL as their mean; k2 is near it."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(50, generator=generator).log_softmax(0)
    q = (p + 0.05 * torch.randn(50, generator=generator)).log_softmax(0)
    exact = (p.exp() * (p - q)).sum().item()
    mean = {kind: (p.exp() * kl_estimate(p, q, kind)).sum().item() for kind in ESTIMATORS}
    assert mean["k1"] == pytest.approx(exact, rel=1e-4)
    assert mean["k3"] == pytest.approx(exact, rel=1e-3)
    assert mean["k2"] == pytest.approx(exact, rel=0.1)


@given(st.floats(-500, 0, width=32), st.floats(-500, 0, width=32))
def test_k2_and_k3_are_finite_and_not_negative(p: float, q: float) -> None:
    """ALGORITHM 22, and the bound on exp: no overflow, no gradient in the wrong direction."""
    log_prob = torch.tensor(p, requires_grad=True)
    for kind in ("k2", "k3"):
        estimate = kl_estimate(log_prob, torch.tensor(q), kind)
        assert estimate.item() >= 0
        assert math.isfinite(estimate.item())
        (slope,) = torch.autograd.grad(estimate, log_prob)
        assert slope.item() * (p - q) >= 0  # descent moves towards the reference


def test_float32_and_names() -> None:
    """ALGORITHM 33, 22: bfloat16 in, float32 out; other names are refused."""
    assert kl_estimate(torch.zeros(2).bfloat16(), torch.zeros(2).bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="'k4': it must be one of k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_adaptive_by_hand() -> None:
    """ALGORITHM 24: error clipped to +-0.2, coef *= 1 + error * answers / horizon."""
    kl = AdaptiveKL(coef=0.1, target=6.0, horizon=10_000)
    kl.update(6.6, answers=500)  # error 0.1
    assert kl.coef == pytest.approx(0.1 * 1.005)
    kl.update(60.0, answers=500)  # error 9, clipped to 0.2
    assert kl.coef == pytest.approx(0.1 * 1.005 * 1.01)
    kl.update(-3.0, answers=1000)  # error -1.5, clipped to -0.2
    assert kl.coef == pytest.approx(0.1 * 1.005 * 1.01 * 0.98)
    kl.update(6.0, answers=1000)
    assert kl.coef == pytest.approx(0.1 * 1.005 * 1.01 * 0.98)


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 100_000)), max_size=20),
    st.integers(0, 20),
)
def test_adaptive_resumes(history: list[tuple[float, int]], cut: int) -> None:
    """ALGORITHM 24: the value is checkpoint state; a resumed controller continues the same."""
    whole, first, second = (AdaptiveKL(0.05, 4.0, 10_000) for _ in range(3))
    for step in history:
        whole.update(*step)
    for step in history[:cut]:
        first.update(*step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in history[cut:]:
        second.update(*step)
    assert second.coef == whole.coef
    assert whole.coef > 0


def test_adaptive_refuses_nan() -> None:
    """One NaN would stay in the coefficient for ever."""
    with pytest.raises(ValueError, match="NaN"):
        AdaptiveKL(0.1, 6.0).update(math.nan, 10)
    with pytest.raises(ValueError, match="target 0"):
        AdaptiveKL(0.1, 0.0)


def test_fixed_stays() -> None:
    """ALGORITHM 24: a fixed coefficient is the setting's, also after a resume."""
    kl = build_kl_controller(0.05, None, 10_000)
    kl.update(1e9, 100)
    assert kl.coef == 0.05
    other = FixedKL(0.02)
    other.load_state_dict(kl.state_dict())
    assert other.coef == 0.02
    assert isinstance(build_kl_controller(0.05, 4.0, 10_000), AdaptiveKL)


def test_controllers_do_not_mix() -> None:
    """A checkpoint of the other kind is refused, with the remedy."""
    with pytest.raises(ValueError, match="set kl_target as it was"):
        FixedKL(0.1).load_state_dict(AdaptiveKL(0.1, 6.0).state_dict())
    with pytest.raises(ValueError, match="'fixed' KL controller"):
        AdaptiveKL(0.1, 6.0).load_state_dict(FixedKL(0.1).state_dict())


class Softmax50:
    """A policy near a reference on 50 tokens, and the exact gradient of KL(policy || reference)."""

    def __init__(self, distance: float) -> None:
        generator = torch.Generator().manual_seed(1)
        self.reference = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(0)
        moved = self.reference + distance * torch.randn(50, generator=generator)
        self.logits = moved.clone().requires_grad_()
        log_p = self.logits.log_softmax(0)
        self.p, self.log_p = log_p.detach().exp(), log_p.detach()
        kl = (log_p.exp() * (log_p - self.reference)).sum()
        (self.exact,) = torch.autograd.grad(kl, self.logits)
        self.kl = float(kl.detach())

    def expected(self, per_token: torch.Tensor) -> torch.Tensor:
        """sum_a p(a) per_token(a) grad log p(a): what sampling does on average."""
        weighted = (self.p * per_token.double() * self.logits.log_softmax(0)).sum()
        (gradient,) = torch.autograd.grad(weighted, self.logits)
        return gradient

    def cosine(self, gradient: torch.Tensor) -> float:
        return float(torch.cosine_similarity(gradient, self.exact, dim=0))


def as_reward(policy: Softmax50) -> torch.Tensor:
    """The expected gradient of what the update minimises with the KL in the reward: 50 answers of
    one token, through the project's token rewards and policy loss."""
    column, ref = policy.log_p.float()[:, None], policy.reference.float()[:, None]
    mask = torch.ones(50, 1, dtype=torch.bool)
    advantages = token_rewards(torch.zeros(50), column, ref, mask, kl_coef=1.0)
    leaf = column.clone().requires_grad_()
    loss, _ = policy_loss(leaf, column, advantages, mask, clip=0.2)
    (by_log_prob,) = torch.autograd.grad(loss, leaf)
    return policy.expected(by_log_prob[:, 0])


def as_loss(policy: Softmax50, kind: str) -> torch.Tensor:
    """The expected gradient of the project's KL loss."""
    leaf = policy.log_p.float()[:, None].requires_grad_()
    mask = torch.ones(50, 1, dtype=torch.bool)
    loss, _ = kl_loss(leaf, policy.reference.float()[:, None], mask, kind)
    (by_log_prob,) = torch.autograd.grad(loss, leaf)
    return policy.expected(by_log_prob[:, 0])


@pytest.mark.parametrize("distance", [0.09, 0.5, 1.2])
def test_gradients_point_where_the_kl_does(distance: float) -> None:
    """ALGORITHM 22: on 50 tokens, enumerated: k1 in the reward and k2 as a loss are the KL's own
    gradient, size included; k3 as a loss is the reverse KL's, near it at small distances only."""
    policy = Softmax50(distance)
    torch.testing.assert_close(as_reward(policy), policy.exact, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(as_loss(policy, "k2"), policy.exact, atol=1e-6, rtol=1e-4)
    reverse = policy.p - policy.reference.exp()  # the gradient of KL(reference || policy)
    torch.testing.assert_close(as_loss(policy, "k3"), reverse, atol=1e-6, rtol=1e-4)
    cosine = policy.cosine(as_loss(policy, "k3"))
    assert 0.8 < cosine < 1 - 1e-4
    assert (cosine > 0.99) == (policy.kl < 0.01)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_other_estimators_in_the_reward_point_elsewhere(kind: str) -> None:
    """ALGORITHM 22: why the reward has k1 alone. Near the reference k2 and k3 as a reward have next
    to none of the KL's gradient, and what there is points anywhere."""
    policy = Softmax50(0.09)
    assert 0.002 < policy.kl < 0.008
    gradient = policy.expected(kl_estimate(policy.log_p, policy.reference, kind))
    assert abs(policy.cosine(gradient)) < 0.5
    assert float(gradient.norm() / policy.exact.norm()) < 0.2


def test_k1_as_a_loss_has_no_gradient() -> None:
    """ALGORITHM 22: the expectation of its gradient is 0, so it is refused."""
    policy = Softmax50(0.5)
    assert policy.expected(torch.ones(50)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="'k1' as a loss"):
        as_loss(policy, "k1")
