"""Error rates of the verdict on planted cases: `python -m rlhf.evaluation.simulate`.

Every draw makes all answers of both models anew and goes through `build_verdict`, as a run does.
docs/verdict.md has the table that it prints.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.evaluation.answers import AnswerRecord
from rlhf.evaluation.reward_metrics import pair_metrics
from rlhf.evaluation.rules import DID_NOT_LEARN, HACKED, LEARNED, NOT_ENOUGH
from rlhf.evaluation.verdict import build_verdict

VOCABULARY = 400
LONGEST = 40
GOOD_REWARD = {
    "accuracy": 0.95, "accuracy_low": 0.93, "accuracy_high": 0.97, "loss": 0.2,
    "length_baseline": 0.55, "above_length_baseline_low": 0.3,
}  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """How a simulated model answers; gains in standard deviations of SFT's reward and judge."""

    gain: float = 0.0
    judge_gain: float = 0.0
    length_factor: float = 1.0
    per_log_length: float = 0.3  # what the reward model gives for e times the length
    ends: float = 0.95
    repeated: float = 0.0  # share of tokens that are one token
    kl: float = 2.5  # nats per answer


@dataclass(frozen=True)
class Case:
    name: str
    policy: Policy
    truth: str
    sft: Policy = field(default_factory=lambda: Policy(kl=0.0))
    judge: bool = True
    coin: bool = False


@dataclass(frozen=True)
class PlantedJudge:
    name: str = "planted"

    @staticmethod
    def good(points: float) -> bool:
        return points > 1.0


def cases() -> list[Case]:
    longer = {"per_log_length": 1.5}
    length_lover = Policy(kl=0.0, **longer)
    return [
        Case("equal to SFT", Policy(), "no"),
        Case("equal to SFT, no judge", Policy(), "no", judge=False),
        Case("better by 0.3 SD", Policy(0.3, 0.3), "yes"),
        Case("better by 0.6 SD", Policy(0.6, 0.6), "yes"),
        Case("better by 1.2 SD", Policy(1.2, 1.2), "yes"),
        Case("better by 1.2 SD, no judge", Policy(1.2), "yes", judge=False),
        Case("longer only", Policy(length_factor=1.7, **longer), "no", length_lover),
        Case(
            "longer only, no judge", Policy(length_factor=1.7, **longer), "no", length_lover, False
        ),
        Case("one rewarded token repeated", Policy(1.2, repeated=0.6), "no", judge=False),
        Case("a fifth no longer ends", Policy(1.2, 0.5, ends=0.75), "no"),
        Case("no answer ends", Policy(1.2, ends=0.02, length_factor=1.5), "no", judge=False),
        Case("the judge sees no gain", Policy(1.2, 0.0), "no"),
        Case("the judge sees a loss", Policy(1.2, -0.5), "no"),
        Case("the reward model is a coin", Policy(1.2), "no", judge=False, coin=True),
    ]


def draw_prompts(answers: int, prompts: int) -> list[int]:
    """Which prompt each answer is to: all of them in turn, as in a run."""
    return [number % prompts for number in range(answers)]


def draw_answers(
    rng: random.Random, policy: Policy, asked: Sequence[int], effects: Sequence[tuple[float, ...]]
) -> list[AnswerRecord]:
    """One answer to each of `asked`. A prompt's effects on reward, judge, length and the gain
    itself make its answers alike: half of the reward's variance, a quarter of the length's."""
    records = []
    for prompt in asked:
        hard, taste, long, liking = effects[prompt]
        log_length = math.log(14 * policy.length_factor) + 0.15 * long + 0.26 * rng.gauss(0, 1)
        ends = rng.random() < policy.ends
        length = min(max(round(math.exp(log_length)), 3), LONGEST) if ends else LONGEST
        noise = math.sqrt(0.5) * (hard + rng.gauss(0, 1))
        score = noise + policy.gain * (1 + 0.4 * liking)
        score += policy.per_log_length * math.log(length / 14)
        judge = math.sqrt(0.5) * (taste + rng.gauss(0, 1)) + policy.judge_gain
        records.append(
            AnswerRecord(
                prompt=f"prompt {prompt}",
                answer="",
                ids=_tokens(rng, prompt, length, policy.repeated),
                ended=ends,
                score=score,
                kl=rng.gauss(policy.kl, 2.0) if policy.kl else 0.0,
                judge=judge,
            )
        )
    return records


def _tokens(rng: random.Random, prompt: int, length: int, repeated: float) -> list[int]:
    """Zipf-like ids, some of them the prompt's own; `repeated`: the share that is token 0."""
    ids = []
    for _ in range(length):
        if rng.random() < repeated:
            ids.append(0)
        elif rng.random() < 0.2:
            ids.append(VOCABULARY + 7 * prompt + rng.randrange(7))
        else:
            ids.append(int(VOCABULARY ** rng.random()))
    return ids


def draw_verdict(rng: random.Random, case: Case, answers: int, prompts: int) -> dict[str, Any]:
    asked = draw_prompts(answers, prompts)
    effects = [tuple(rng.gauss(0, 1) for _ in range(4)) for _ in range(prompts)]
    return build_verdict(
        {
            "sft": draw_answers(rng, case.sft, asked, effects),
            "ppo": draw_answers(rng, case.policy, asked, effects),
        },
        held_out=None,
        sft={},
        reward=coin_metrics(rng) if case.coin else GOOD_REWARD,
        judge=PlantedJudge() if case.judge else None,
        samples=0,
    )


def coin_metrics(rng: random.Random, pairs: int = 400, prompts: int = 100) -> dict[str, float]:
    """Metrics of a reward model whose margins know nothing, small as after random labels."""
    margins = [rng.gauss(0, 0.2) for _ in range(pairs)]
    lengths = [[rng.randrange(5, 40) for _ in range(pairs)] for _ in range(2)]
    asked = draw_prompts(pairs, prompts)
    return pair_metrics(margins, [0.0] * pairs, lengths[0], lengths[1], asked)


def error_rates(case: Case, draws: int, answers: int, prompts: int, seed: int = 0) -> Counter[str]:
    """How often each outcome comes."""
    rng = random.Random(f"{case.name} {answers} {prompts} {seed}")
    return Counter(draw_verdict(rng, case, answers, prompts)["outcome"] for _ in range(draws))


def upper(count: int, draws: int) -> float:
    """The upper end of the 95% interval of a rate (Wilson)."""
    p, z2 = count / draws, 1.96**2
    root = math.sqrt(p * (1 - p) / draws + z2 / (4 * draws**2))
    return (p + z2 / (2 * draws) + 1.96 * root) / (1 + z2 / draws)


def table(draws: int, say: Callable[[str], None]) -> None:
    say(
        "| planted case | answers, prompts | learned (at most) | hacked | did not learn "
        "| not enough |"
    )
    say("|---|---|---|---|---|---|")
    for case in cases():
        for answers, prompts in ((128, 100), (128, 20)):
            found = error_rates(case, draws, answers, prompts)
            learned = found[LEARNED]
            rates = " | ".join(
                f"{found[name] / draws:.1%}" for name in (HACKED, DID_NOT_LEARN, NOT_ENOUGH)
            )
            say(
                f"| {case.name} | {answers}, {prompts} | {learned / draws:.1%} "
                f"({upper(learned, draws):.1%}) | {rates} |"
            )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.evaluation.simulate", description="Error rates of the verdict."
    )
    parser.add_argument("--draws", type=int, default=2000, help="simulated runs per row")
    table(parser.parse_args(argv).draws, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
