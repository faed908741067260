"""The verdict of a run: what was learned, in figures and words. Imports no torch.

`python -m rlhf.evaluation.verdict RUN_DIR` prints it again and exits 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.evaluation.published import verdict_of
from rlhf.redact import printable
from rlhf.store import RunDir

MAX_KL = 15.0  # nats per answer: beyond it the policy has left what the reward model knows
EOS_SLACK = 0.02
DISTINCT_SHARE = 0.8


def build_verdict(
    *,
    models: dict[str, dict[str, float]],
    gain: tuple[float, float],
    samples: list[dict[str, str]],
    sft: dict[str, Any],
    reward: dict[str, Any],
    judge: str | None,
) -> dict[str, Any]:
    """Figures and checks.

    Args:
        models: "base" (if known), "sft", "ppo" -> `answers.summarise`'s figures.
        gain: mean rise of PPO's reward over SFT's on the same prompts, half its 95% interval.
        samples: prompt and the models' answers.
        sft, reward: metrics of the parents' manifests, empty for foreign models.
        judge: name of the rule-based judge.
    """
    before, after = models["sft"], models["ppo"]
    std = before["reward_std"] or 1.0
    checks = {
        "reward rose by more than its confidence interval": gain[0] > gain[1],
        f"KL to the reference is below {MAX_KL:g} nats per answer": after["kl"] < MAX_KL,
        "answers still end": after["eos_fraction"] >= before["eos_fraction"] - EOS_SLACK,
        "answers stay varied": after["distinct_2"] >= DISTINCT_SHARE * before["distinct_2"],
    }
    if "judge" in after:
        checks[f"the judge ({judge}) agrees"] = after["judge"] > before["judge"]
        checks["more answers are fully good"] = after["judge_good"] > before["judge_good"]
    return {
        "sft_perplexity": sft.get("perplexity"),
        "reward_accuracy": reward.get("accuracy"),
        "models": models,
        "gain": gain[0],
        "gain_ci": gain[1],
        "gain_in_sft_std": gain[0] / std,
        "judge": judge,
        "samples": samples,
        "checks": checks,
        "learned": all(checks.values()),
    }


def render(verdict: dict[str, Any]) -> str:
    """The verdict as text for a person."""
    lines = ["", "VERDICT"]
    if verdict["sft_perplexity"] is not None:
        lines.append(f"  step 1  SFT held-out perplexity     {verdict['sft_perplexity']:.3f}")
    if verdict["reward_accuracy"] is not None:
        lines.append(f"  step 2  reward held-out accuracy    {verdict['reward_accuracy']:.4f}")
    lines.append(
        f"  step 3  reward gain PPO over SFT    {verdict['gain']:+.3f} +- {verdict['gain_ci']:.3f}"
        f"  ({verdict['gain_in_sft_std']:.2f} SFT standard deviations)"
    )
    lines += ["", *_table(verdict), ""]
    for sample in verdict["samples"]:
        lines.append(f"  prompt: {sample['prompt'].strip()!r}")
        lines += [f"    {name:>4}: {text!r}" for name, text in sample.items() if name != "prompt"]
    lines.append("")
    for check, passed in verdict["checks"].items():
        lines.append(f"  [{'ok' if passed else 'NO'}] {check}")
    count = int(verdict["models"]["ppo"]["answers"])
    lines.append(
        f"  {'It learned' if verdict['learned'] else 'It did NOT learn as it should'}: "
        f"{sum(verdict['checks'].values())} of {len(verdict['checks'])} checks hold, "
        f"{count} answers to held-out prompts, 95% intervals."
    )
    # What a model wrote is quoted above, escape sequences and all; names and judges are not.
    return printable("\n".join(lines) + "\n")


def _table(verdict: dict[str, Any]) -> list[str]:
    judge = verdict["judge"]
    head = ["model", "reward", "KL", "length", "EOS", "distinct-2"]
    head += [f"judge ({judge})", "fully good"] if judge else []
    rows = [head]
    for name, m in verdict["models"].items():
        row = [
            name,
            f"{m['reward']:.3f} +- {m['reward_ci']:.3f}",
            f"{m['kl']:.2f}",
            f"{m['length']:.1f}",
            f"{m['eos_fraction']:.3f}",
            f"{m['distinct_2']:.3f}",
        ]
        if judge:
            row += [f"{m['judge']:.3f} +- {m['judge_ci']:.3f}", f"{m['judge_good']:.3f}"]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _with_floats(verdict: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: the store writes it as text (intervals of a single prompt)."""
    figures = {key: float(verdict[key]) for key in ("gain", "gain_ci", "gain_in_sft_std")}
    models = {
        name: {key: float(value) for key, value in model.items()}
        for name, model in _in_order(verdict["models"]).items()
    }
    samples = [_in_order(sample) for sample in verdict["samples"]]
    return verdict | figures | {"models": models, "samples": samples}


def _in_order(by_model: dict[str, Any]) -> dict[str, Any]:
    """JSON files have their keys sorted; a person reads base, SFT, PPO."""
    return {
        key: by_model[key] for key in ("prompt", "base", "sft", "ppo", "ema") if key in by_model
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.evaluation.verdict", description="Print and check a run's verdict."
    )
    parser.add_argument("run", type=Path, help="the run's directory, e.g. output/tiny_cpu")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--min-accuracy", type=float, default=0.0, help="reward accuracy needed")
    parser.add_argument(
        "--min-gain", type=float, default=0.0, help="reward gain needed, in SFT standard deviations"
    )
    args = parser.parse_args(argv)
    try:
        verdict = _with_floats(verdict_of(RunDir(args.run)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(verdict, indent=2) if args.json else render(verdict))
    failures = [check for check, passed in verdict["checks"].items() if not passed]
    if (verdict["reward_accuracy"] or 0.0) < args.min_accuracy:
        failures.append(f"reward accuracy {verdict['reward_accuracy']} < {args.min_accuracy}")
    if not verdict["gain_in_sft_std"] >= args.min_gain:  # NaN, of too few prompts, is no gain
        failures.append(f"gain {verdict['gain_in_sft_std']:.3f} < {args.min_gain} SFT std")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
