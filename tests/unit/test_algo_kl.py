"""KL estimators and controllers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algo.kl import ESTIMATORS, AdaptiveKL, FixedKL, build_kl_controller, kl_estimate


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
