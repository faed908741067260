"""Is a reward model good enough to train on? Judged before anything that is trained on it.

Pure: from the metrics of its manifest. Imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

LN_2 = math.log(2)  # the loss of a model that knows nothing and says so
PASSES, FAILS, UNKNOWN = "better than the baselines", "not better than the baselines", "unknown"
_DATA = (
    "look at the pairs (is chosen the better one? do they agree with each other?), and bring more"
)


class RewardJudgement(NamedTuple):
    """`outcome` is PASSES, FAILS or UNKNOWN; why; what to do, or ""."""

    outcome: str
    reason: str
    remedy: str

    def line(self) -> str:
        """For printing."""
        head = f"reward model: {self.outcome}: {self.reason}"
        return f"{head}. {self.remedy[0].upper()}{self.remedy[1:]}" if self.remedy else head


def judge_reward_model(metrics: Mapping[str, Any]) -> RewardJudgement:
    """By the metrics of `pair_metrics`, as they stand in a reward artifact's manifest.

    It passes where the accuracy's interval over prompts is above 0.5, the accuracy is above that
    of choosing by length alone by more than the interval of their difference, and the loss is
    below ln 2. (Which side of a pair comes first is not known here, so 0.5 is the majority
    baseline too.) A manifest without figures, or without their intervals, leaves it unknown.
    """
    accuracy = _number(metrics, "accuracy")
    low, high = _number(metrics, "accuracy_low"), _number(metrics, "accuracy_high")
    if accuracy is None:
        why = "nothing says how well it ranks held-out pairs (not measured, or a foreign model)"
        return RewardJudgement(UNKNOWN, why, "")
    if low is None or high is None:
        why = f"accuracy {accuracy:.3f} without an interval (one prompt, or an older release)"
        return RewardJudgement(UNKNOWN, why, "make step 2 again (--step 2) to have it measured")
    shown = f"accuracy {accuracy:.3f} (95% interval over prompts {low:.3f} to {high:.3f})"
    if low <= 0.5:
        return RewardJudgement(FAILS, f"{shown}: that of a coin is 0.5", _DATA)
    loss = _number(metrics, "loss")
    if loss is not None and loss >= LN_2:
        why = (
            f"{shown}, but loss {loss:.3f}: one that knows nothing has ln 2 = {LN_2:.3f}, so its "
            "margins are larger than it is right"
        )
        remedy = "train it less (fewer step2.train.epochs, a lower step2.optim.learning_rate), or "
        return RewardJudgement(FAILS, why, remedy + _DATA)
    by_length = _number(metrics, "length_baseline")
    above = _number(metrics, "above_length_baseline_low")
    if by_length is not None and (above is None or above <= 0):
        why = f"{shown}: not told apart from choosing by length alone ({by_length:.3f})"
        return RewardJudgement(FAILS, why, "balance the pairs' lengths, or bring more pairs")
    return RewardJudgement(PASSES, f"{shown}{_length_bias(metrics)}", "")


def _length_bias(metrics: Mapping[str, Any]) -> str:
    """A warning where it is wrong about most pairs whose better answer is the shorter (longer)."""
    for name in ("shorter", "longer"):
        high = _number(metrics, f"accuracy_chosen_{name}_high")
        if high is not None and high < 0.5:
            value = metrics[f"accuracy_chosen_{name}"]
            return f"; warning: it leans on length: {value:.3f} where the chosen answer is {name}"
    return ""


def _number(metrics: Mapping[str, Any], name: str) -> float | None:
    """None where it is absent; the store writes NaN as text."""
    try:
        value = float(metrics[name])
    except (KeyError, TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
