"""A verdict as text: the conclusion, the figures, the samples, the rules."""

from __future__ import annotations

import textwrap
from typing import Any

from rlhf.config.rewards import MODEL
from rlhf.evaluation.answers import TERM
from rlhf.evaluation.compare import number
from rlhf.redact import printable

WIDTH = 100
NAMES = ("base", "sft", "ppo", "ema")
_FIGURES = {
    "reward": ("reward", 3),
    "reward_within_lengths": ("  at equal length", 3),
    "judge": ("judge", 3),
    "judge_good": ("fully good", 3),
    "eos_fraction": ("answers that end", 3),
    "length": ("length, tokens", 1),
    "distinct_2": ("distinct-2 at equal size", 3),
}


def render(verdict: dict[str, Any]) -> str:
    """The verdict as text for a person."""
    decision = verdict["decisions"]["ppo"]
    lines = ["", f"VERDICT: {verdict['outcome'].upper()}"]
    lines += _wrapped(f"Why: {decision['rule']}.")
    lines += _wrapped(f"Next: {decision['next']}.")
    lines += ["", *_steps(verdict), *_wrapped(_evidence(verdict) + ". All intervals are 95%.")]
    lines += ["", *_comparisons(verdict, "ppo"), "", *_models(verdict)]
    if "ema" in verdict["decisions"]:
        ema = verdict["decisions"]["ema"]
        lines += ["", *_wrapped(f"The averaged policy (ema): {ema['outcome']}: {ema['rule']}.")]
    for sample in verdict["samples"]:
        lines += ["", f"  prompt: {sample['prompt'].strip()!r}"]
        lines += [f"    {name:>4}: {sample[name]!r}" for name in NAMES if name in sample]
    lines += ["", "  What was asked, in this order (docs/verdict.md):"]
    marks = {
        "holds": "ok",
        "broken": "NO",
        "not shown": "??",
        "unknown": "--",
        "not told apart": "--",
    }
    lines += [f"  [{marks[state]}] {point}: {state}" for point, state in decision["points"]]
    # What a model wrote is quoted above, escape sequences and all; names and judges are not.
    return printable("\n".join(lines) + "\n")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


def _evidence(verdict: dict[str, Any]) -> str:
    text = f"{verdict['answers']} answers of each model to {verdict['prompts']} prompts"
    held_out = verdict.get("held_out")
    if held_out is None or not held_out["prompts"]:
        return text
    if held_out["seen"] == 0:
        return f"{text}, none of them seen in training"
    if held_out["seen"] == held_out["prompts"]:
        return f"{text}, all seen in training"
    return (
        f"{text}; of the {held_out['prompts']} held-out prompts training has seen "
        f"{held_out['seen']}"
    )


def _steps(verdict: dict[str, Any]) -> list[str]:
    lines = []
    if verdict["sft_perplexity"] is not None:
        before = _before(verdict["sft_perplexity_before"])
        shown = number(float(verdict["sft_perplexity"]), ".3f")
        lines.append(f"  step 1  SFT held-out perplexity   {shown}{before}")
    if verdict["reward_accuracy"] is not None:
        before = _before(verdict["reward_accuracy_before"])
        shown = number(float(verdict["reward_accuracy"]), ".3f")
        lines.append(f"  step 2  reward held-out accuracy  {shown}{before}")
    reward = verdict["reward_model"]
    if reward is not None:
        lines += _wrapped(f"The reward model: {reward['outcome']}: {reward['reason']}.")
    if verdict.get("rewards", MODEL) != MODEL:
        lines += _wrapped(f"The reward: {verdict['rewards']}.")
    gain = f"  step 3  reward gain PPO over SFT  {number(verdict['gain'], '+.3f')}"
    if "gain_low" in verdict:
        gain += (
            f" ({number(verdict['gain_low'], '+.3f')} to {number(verdict['gain_high'], '+.3f')})"
        )
    if "gain_in_sft_std" in verdict:
        gain += f", {number(verdict['gain_in_sft_std'], '.2f')} SFT standard deviations"
    return [*lines, gain, *_share_within(verdict)]


def _before(value: Any) -> str:
    return "" if value is None else f"  (before training {number(float(value), '.3f')})"


def _share_within(verdict: dict[str, Any]) -> list[str]:
    """The part of the gain that stays between answers of equal length, where there is a gain."""
    found = verdict["comparisons"]["ppo"]
    gain = found["reward"]
    if verdict["reward_model"] is None:
        return []
    if gain["outcome"] != "better" or "reward_within_lengths" not in found:
        return []
    share = found["reward_within_lengths"]["change"] / gain["change"]
    return [f"          {share:.0%} of the gain stays between answers of equal length"]


def _comparisons(verdict: dict[str, Any], name: str) -> list[str]:
    rows = [["", "sft", name, "change", "95% interval", ""]]
    terms = [key for key in verdict["comparisons"][name] if key.startswith(TERM)]
    shown = {"reward": _FIGURES["reward"]}
    if len(terms) > 1:
        shown |= {key: (f"  {key.removeprefix(TERM)}", 3) for key in terms}
    for key, (label, digits) in (shown | _FIGURES).items():
        found = verdict["comparisons"][name].get(key)
        if found is None:
            continue
        change = f"+.{digits}f" if key != "distinct_2" else "+.0%"
        ends = "none"
        if "low" in found:
            ends = f"{number(found['low'], change)} to {number(found['high'], change)}"
        if key == "judge":
            label = f"judge ({verdict['judge']})"
        models = [number(found[when], f".{digits}f") for when in ("before", "after")]
        if key == "reward_within_lengths":  # a rise, not a figure of either model
            models = ["", ""]
        rows.append([label, *models, number(found["change"], change), ends, found["outcome"]])
    return _aligned(rows)


def _models(verdict: dict[str, Any]) -> list[str]:
    head = ["model", "reward", "KL/answer", "KL/token", "length", "EOS", "distinct-2 of all"]
    judge = any("judge" in m for m in verdict["models"].values())
    rows = [head + (["judge", "fully good"] if judge else [])]
    for name in NAMES:
        if name not in verdict["models"]:
            continue
        m = verdict["models"][name]
        per_token = f"{number(m['kl_per_token'], '.3f')}" if "kl_per_token" in m else ""
        row = [name, _with_half(m, "reward"), _with_half(m, "kl"), per_token]
        row += [
            f"{number(m['length'], '.1f')}",
            f"{number(m['eos_fraction'], '.3f')}",
            f"{number(m['distinct_2'], '.3f')}",
        ]
        if judge:
            row += [
                f"{number(m[key], '.3f')}" if key in m else "" for key in ("judge", "judge_good")
            ]
        rows.append(row)
    return _aligned(rows)


def _with_half(figures: dict[str, float], name: str) -> str:
    text = f"{number(figures[name], '.2f')}"
    if f"{name}_low" not in figures:
        return text
    return f"{text} +- {(figures[f'{name}_high'] - figures[f'{name}_low']) / 2:z.2f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
