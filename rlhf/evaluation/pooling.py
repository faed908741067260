"""Several seeds' verdicts as one: the runs are the sample, so the interval is over runs.

A run's own interval says how well its gain is known, not whether another seed would have it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rlhf.errors import ConfigError

# Student's t, 97.5%, for 1 to 30 degrees of freedom: half a 95% interval in standard errors.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
MODELS = ("base", "sft", "ppo", "ema")
FIGURES = ("reward", "kl", "length", "eos_fraction", "distinct_2", "judge", "judge_good")


def pool(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the runs with 95% intervals (Student's t over runs); two runs or more.

    `gain`, `models` (those that every run has; a figure that a run lacks is absent), how many runs
    learned, and `outcome`: better, worse, or not told apart. Raises ConfigError for fewer runs.
    """
    if len(verdicts) < 2:
        raise ConfigError(f"{len(verdicts)} verdict(s): a verdict over seeds needs two or more")
    names = [name for name in MODELS if all(name in v["models"] for v in verdicts)]
    models = {name: _means([v["models"][name] for v in verdicts]) for name in names}
    gains = [float(v["gain"]) for v in verdicts]
    gain, half = interval(gains)
    outcome = "not told apart"
    if abs(gain) > half:
        outcome = "better" if gain > 0 else "worse"
    return {
        "runs": len(verdicts),
        "learned": sum(bool(v["learned"]) for v in verdicts),
        "gain": gain,
        "gain_ci": half,
        "gains": gains,
        "outcome": outcome,
        "models": models,
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval."""
    t = _T[min(len(values) - 1, len(_T)) - 1]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def render_pooled(pooled: dict[str, Any]) -> str:
    """The verdict over seeds as text for a person."""
    gains = ", ".join(f"{gain:+.3f}" for gain in pooled["gains"])
    lines = [
        f"VERDICT over {pooled['runs']} seeds; intervals are over runs (Student's t, 95%)",
        f"  {pooled['learned']} of {pooled['runs']} runs learned",
        f"  reward gain PPO over SFT  {pooled['gain']:+.3f} +- {pooled['gain_ci']:.3f} ({gains})",
        "",
    ]
    for name, figures in pooled["models"].items():
        shown = [f"{key} {mean:.3f} +- {half:.3f}" for key, (mean, half) in figures.items()]
        lines.append(f"  {name:4}  {', '.join(shown)}")
    return "\n".join([*lines, "", f"  PPO against SFT over seeds: {pooled['outcome']}", ""])


def _means(models: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    return {
        key: interval([float(model[key]) for model in models])
        for key in FIGURES
        if all(key in model for model in models)
    }
