"""KL estimators by name, and the controllers of the KL coefficient."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) for tokens drawn from the policy (22).

    With d = log_probs - ref_log_probs: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d
    (J. Schulman, "Approximating KL divergence", 2020). Shapes: any, equal; float32 out.
    k3 is flat below d = -20, where exp would overflow. Raises ValueError for another kind.
    """
    difference = log_probs.float() - ref_log_probs.float()
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        # Both terms are clamped, or the gradient of what remains would point the wrong way.
        difference = difference.clamp(min=-MAX_LOG_RATIO)
        return torch.expm1(-difference) + difference
    raise ValueError(f"KL estimator {kind!r}: it must be one of {', '.join(ESTIMATORS)}")


class KLController(Protocol):
    """Gives the KL coefficient of an iteration and may change it afterwards."""

    coef: float

    def update(self, kl_per_answer: float, answers: int) -> None:
        """Take note of an iteration's mean KL per answer, over all ranks' `answers`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs (24); plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; ValueError if it is another kind of controller's."""
        ...


class FixedKL:
    """A coefficient that stays. It is a setting, not state: a resumed run takes it from there."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl_per_answer: float, answers: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "fixed"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_kind(state, "fixed")


class AdaptiveKL:
    """Steers the KL per answer towards `target` (24; Ziegler et al., arXiv 1909.08593, 2.2).

    error = clip(kl / target - 1, -0.2, 0.2); coef *= 1 + error * answers / horizon.
    The coefficient is checkpoint state.
    """

    def __init__(self, coef: float, target: float, horizon: float = 10_000.0) -> None:
        if target <= 0 or horizon <= 0:
            raise ValueError(f"target {target} and horizon {horizon}: both must be above 0")
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl_per_answer: float, answers: int) -> None:
        """Raises ValueError if the KL is NaN: the coefficient would be NaN for ever."""
        if math.isnan(kl_per_answer):
            raise ValueError("KL per answer is NaN: the policy or the reference gave NaN log-probs")
        error = min(max(kl_per_answer / self.target - 1.0, -0.2), 0.2)
        # Above 5 horizons of answers at once the factor could reach 0 and stay there.
        self.coef *= max(1.0 + error * answers / self.horizon, 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "adaptive", "coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_kind(state, "adaptive")
        self.coef = float(state["coef"])


def build_kl_controller(coef: float, target: float | None, horizon: float) -> KLController:
    """`AdaptiveKL` if there is a target, else `FixedKL`."""
    return FixedKL(coef) if target is None else AdaptiveKL(coef, target, horizon)


def _check_kind(state: dict[str, Any], kind: str) -> None:
    if state.get("kind") != kind:
        raise ValueError(
            f"checkpoint has a {state.get('kind')!r} KL controller, this run a {kind!r} one: "
            "set kl_target as it was, or start a new run"
        )
