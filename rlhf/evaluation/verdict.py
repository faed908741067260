"""The verdict of a run: what was learned, and how sure that is. Imports no torch.

`python -m rlhf.evaluation.verdict RUN_DIR` prints it again and exits 1 unless it is `learned`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf.config.rewards import RewardTerm, described
from rlhf.errors import RequirementError, UserError
from rlhf.evaluation.answers import AnswerRecord, prompt_keys, summarise
from rlhf.evaluation.compare import compare
from rlhf.evaluation.published import verdict_of
from rlhf.evaluation.render import render
from rlhf.evaluation.reward_model import judge_reward_model
from rlhf.evaluation.rules import LEARNED, Evidence, decide
from rlhf.store import RunDir

__all__ = ["build_verdict", "main", "render"]

FORMAT = 2


class NamedJudge(Protocol):
    """What a verdict needs of `rlhf.rewards.Judge`."""

    @property
    def name(self) -> str: ...
    @property
    def good(self) -> Callable[[float], bool]: ...


class HeldOutPrompts(Protocol):
    """What a verdict needs of `rlhf.data.HeldOut`."""

    @property
    def prompts(self) -> int: ...
    @property
    def seen(self) -> int: ...


def build_verdict(
    answers: Mapping[str, Sequence[AnswerRecord]],
    *,
    held_out: HeldOutPrompts | None,
    sft: Mapping[str, Any],
    reward: Mapping[str, Any] | None,
    judge: NamedJudge | None,
    samples: int,
    rewards: Sequence[RewardTerm] = (RewardTerm(),),
) -> dict[str, Any]:
    """Figures, comparisons and outcomes.

    Args:
        answers: sft and ppo, and where they are there base and ema, to the same prompts in the
            same order. Several answers to one prompt count as one, their mean.
        held_out: how many different prompts are held out, and how many of them training has seen.
        sft, reward: metrics of the parents' manifests, empty for foreign models; reward None: no
            reward model was asked.
        rewards: the terms whose sum the records' scores are.
        judge: whose points the records have.
        samples: how many prompts are shown with all models' answers.

    Raises ValueError for models that answered different prompts.
    """
    good = judge.good if judge else None
    models = {name: summarise(records, good) for name, records in answers.items()}
    judged = None if reward is None else judge_reward_model(reward)
    reward = reward or {}
    comparisons, decisions = {}, {}
    for name in ("ppo", "ema"):
        if name in answers:
            found = compare(answers["sft"], answers[name], good)
            own = models[name]
            evidence = Evidence(
                found=found,
                deviation=models["sft"].get("reward_std", 0.0),
                prompts=int(own["prompts"]),
                kl=own["kl"],
                kl_high=own.get("kl_high"),
                kl_per_token=own.get("kl_per_token", 0.0),
                judge=judge.name if judge and "judge" in own else None,
            )
            comparisons[name] = {key: value.as_json() for key, value in found.items()}
            decisions[name] = decide(evidence, judged).as_json()
    gain = comparisons["ppo"]["reward"]
    deviation = models["sft"].get("reward_std", 0.0)
    verdict = {
        "format": FORMAT,
        "outcome": decisions["ppo"]["outcome"],
        "learned": decisions["ppo"]["outcome"] == LEARNED,
        "decisions": decisions,
        "comparisons": comparisons,
        "models": models,
        "answers": len(answers["sft"]),
        "prompts": len(set(prompt_keys(answers["sft"]))),
        "judge": judge.name if judge else None,
        "gain": gain["change"],
        "sft_perplexity": sft.get("perplexity"),
        "sft_perplexity_before": sft.get("perplexity_before"),
        "reward_accuracy": reward.get("accuracy"),
        "reward_accuracy_before": reward.get("accuracy_before"),
        "reward_model": judged._asdict() if judged else None,
        "rewards": described(rewards),
        "samples": _samples(answers, samples),
    }
    if "low" in gain:
        verdict |= {"gain_low": gain["low"], "gain_high": gain["high"]}
    if deviation:
        verdict["gain_in_sft_std"] = gain["change"] / deviation
    if held_out is not None:
        verdict["held_out"] = {"prompts": held_out.prompts, "seen": held_out.seen}
    return verdict


def _samples(answers: Mapping[str, Sequence[AnswerRecord]], count: int) -> list[dict[str, str]]:
    """Answers to different prompts, side by side."""
    firsts: dict[str, int] = {}
    for index, key in enumerate(prompt_keys(answers["sft"])):
        firsts.setdefault(key, index)
    return [
        {"prompt": answers["sft"][i].prompt}
        | {name: records[i].answer for name, records in answers.items()}
        for i in list(firsts.values())[:count]
    ]


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
        verdict = verdict_of(RunDir(args.run))
        if verdict.get("format") != FORMAT:
            raise RequirementError(
                f"{args.run}: its verdict is an older release's. Make it again with: "
                f"python train.py evaluate {args.run}"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(verdict, indent=2) if args.json else render(verdict))
    failures = _failures(verdict, args.min_accuracy, args.min_gain)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _failures(verdict: dict[str, Any], min_accuracy: float, min_gain: float) -> list[str]:
    failures = []
    if verdict["outcome"] != LEARNED:
        failures.append(f"{verdict['outcome']}: {verdict['decisions']['ppo']['rule']}")
    accuracy = verdict["reward_accuracy"]
    if min_accuracy and (accuracy is None or not float(accuracy) >= min_accuracy):
        said = "unknown" if accuracy is None else accuracy
        failures.append(f"reward accuracy {said} < {min_accuracy}")
    gain = verdict.get("gain_in_sft_std")
    if min_gain and (gain is None or not float(gain) >= min_gain):
        said = "unknown" if gain is None else f"{float(gain):.3f}"
        failures.append(f"gain {said} < {min_gain} SFT std")
    return failures


if __name__ == "__main__":
    sys.exit(main())
