"""Several seeds' verdicts as one: the runs are the sample, so the interval is over runs.

A run's own interval says how well its gain is known, not whether another seed would have it.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf.errors import ConfigError
from rlhf.evaluation.intervals import Interval, mean_interval
from rlhf.evaluation.rules import DID_NOT_LEARN, HACKED, LEARNED, NOT_ENOUGH

MODELS = ("base", "sft", "ppo", "ema")
FIGURES = ("reward", "kl", "length", "eos_fraction", "distinct_2", "judge", "judge_good")


def pool(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the runs with 95% intervals (Student's t over runs); two runs or more.

    `gain`, in SFT standard deviations too where every run has it; `models` (those that every run
    has; a figure that a run lacks is absent); `outcomes` run by run, how many `learned`, and the
    pooled `outcome` with its `rule`. Raises ConfigError for fewer runs.
    """
    if len(verdicts) < 2:
        raise ConfigError(f"{len(verdicts)} verdict(s): a verdict over seeds needs two or more")
    names = [name for name in MODELS if all(name in v["models"] for v in verdicts)]
    gains = [float(v["gain"]) for v in verdicts]
    gain = mean_interval(gains)
    outcomes = [v["outcome"] for v in verdicts]
    outcome, rule = _decide(Counter(outcomes), gain)
    pooled = {
        "runs": len(verdicts),
        "outcomes": outcomes,
        "learned": outcomes.count(LEARNED),
        "gain": gain.mean,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "gains": gains,
        "outcome": outcome,
        "rule": rule,
        "models": {name: _means([v["models"][name] for v in verdicts]) for name in names},
    }
    if all("gain_in_sft_std" in v for v in verdicts):
        pooled["gain_in_sft_std"] = mean_interval([float(v["gain_in_sft_std"]) for v in verdicts])
    return pooled


def _decide(counts: Counter[str], gain: Interval) -> tuple[str, str]:
    """Most runs must have learned, none hacked its reward, and the gain hold over runs."""
    runs, learned, hacked = sum(counts.values()), counts[LEARNED], counts[HACKED]
    if 2 * hacked >= runs:
        return HACKED, f"{hacked} of {runs} runs hacked the reward"
    above = gain.low is not None and gain.low > 0
    if 2 * learned > runs and not hacked and above:
        return LEARNED, f"{learned} of {runs} runs learned, and the interval over runs is above 0"
    if not learned and 2 * counts[DID_NOT_LEARN] >= runs:
        return DID_NOT_LEARN, f"{counts[DID_NOT_LEARN]} of {runs} runs did not learn, and none did"
    interval = "above 0" if above else "not above 0"
    why = f"{learned} of {runs} runs learned, {hacked} hacked the reward, and the interval over "
    return NOT_ENOUGH, f"{why}runs is {interval}: more seeds, or settings that all seeds bear"


def render_pooled(pooled: dict[str, Any]) -> str:
    """The verdict over seeds as text for a person."""
    lines = [
        f"VERDICT over {pooled['runs']} seeds: {pooled['outcome'].upper()}",
        *textwrap.wrap(
            f"Why: {pooled['rule']}.", 100, initial_indent="  ", subsequent_indent="    "
        ),
        "  Intervals are over runs (Student's t, 95%).",
        "",
        f"  reward gain PPO over SFT  {pooled['gain']:+.3f} "
        f"({pooled['gain_low']:+.3f} to {pooled['gain_high']:+.3f})",
    ]
    if "gain_in_sft_std" in pooled:
        mean, low, high = pooled["gain_in_sft_std"]
        lines.append(f"  in SFT standard deviations  {mean:+.2f} ({low:+.2f} to {high:+.2f})")
    runs = zip(pooled["gains"], pooled["outcomes"], strict=True)
    lines += [f"    run {i}: {gain:+.3f}  {outcome}" for i, (gain, outcome) in enumerate(runs, 1)]
    lines.append("")
    for name, figures in pooled["models"].items():
        shown = [
            f"{key} {mean:.3f} ({low:.3f} to {high:.3f})"
            for key, (mean, low, high) in figures.items()
        ]
        lines += [f"  {name}", *(f"    {text}" for text in shown)]
    return "\n".join([*lines, ""])


def _means(models: Sequence[dict[str, Any]]) -> dict[str, Interval]:
    return {
        key: mean_interval([float(model[key]) for model in models])
        for key in FIGURES
        if all(key in model for model in models)
    }
