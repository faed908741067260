"""What comparisons come to: one outcome, the rule that decided, what to do next. docs/verdict.md
has the reasons and the error rates.

`learned` asks for evidence on every point: each of them alone lets a policy that has not learned
through in at most 2.5% of runs, so all of them together do too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.evaluation.compare import (
    BETTER,
    HIGHER,
    LOWER,
    NOT_TOLD_APART,
    WORSE,
    Comparison,
    number,
)
from rlhf.evaluation.reward_model import FAILS, PASSES, UNKNOWN, RewardJudgement

LEARNED, DID_NOT_LEARN = "learned", "did not learn"
HACKED, NOT_ENOUGH = "hacked the reward", "not enough evidence"

SMALL_GAIN = 0.2  # SFT standard deviations: Cohen's small effect
STILL_KL = SMALL_GAIN**2 / 2  # nats per answer: a gain is at most sqrt(2 KL) deviations
EOS_MARGIN = 0.125  # share of answers that may stop ending
LENGTH_SHARE = 0.5  # of the gain that must be left between answers of equal length
VARIETY_MARGIN = 0.4  # share of distinct-2 that may go
FAR_KL, FAR_KL_PER_TOKEN = 15.0, 0.5  # beyond both, nothing says that the reward model is right


@dataclass(frozen=True)
class Decision:
    """One of the four outcomes, why, what to do next, and the points that were looked at."""

    outcome: str
    rule: str
    next: str
    points: dict[str, str]
    """Point -> holds, broken, not shown; of a reward model also unknown, and of fully good
    answers not told apart: these two stand in no outcome's way."""

    def as_json(self) -> dict[str, Any]:
        """The points as pairs: JSON files have their keys sorted, and these have an order."""
        return self.__dict__ | {"points": list(self.points.items())}


@dataclass(frozen=True)
class Evidence:
    """What a decision is made from: comparisons of a model with SFT, and its KL to it."""

    found: Mapping[str, Comparison]
    deviation: float  # of SFT's reward over answers; 0: unknown
    prompts: int
    kl: float
    kl_high: float | None
    kl_per_token: float
    judge: str | None


def decide(evidence: Evidence, reward: RewardJudgement | None) -> Decision:
    """The outcome for one model. The first rule that applies decides.

    reward: None where functions alone give the reward. What is asked because a reward model may be
    wrong (its baselines, the length of answers, their variety, KL) is not asked then: a function is
    what was wanted, also where that is short or uniform answers.
    """
    points = _points(evidence, reward)
    for rule in (_reward_model, _still, _no_gain, _hacked, _not_shown):
        decided = rule(evidence, reward, points)
        if decided is not None:
            outcome, why, remedy = decided
            return Decision(outcome, why, remedy, points)
    gain = evidence.found["reward"]
    rest = [f"{point}: {state}" for point, state in points.items() if state != HOLDS]
    held = f"every other point holds ({'; '.join(rest)})" if rest else "every point holds"
    why = f"the reward rose by {number(gain.change, '+.3f')} ({_ends(gain)}) and {held}"
    return Decision(LEARNED, why, "look at the samples; the figures say nothing of taste", points)


Found = tuple[str, str, str] | None
Points = Mapping[str, str]
HOLDS, BROKEN, NOT_SHOWN = "holds", "broken", "not shown"


def _points(evidence: Evidence, reward: RewardJudgement | None) -> dict[str, str]:
    found = evidence.found
    points = {}
    if reward is not None:
        trusted = {PASSES: HOLDS, FAILS: BROKEN, UNKNOWN: UNKNOWN}[reward.outcome]
        points["the reward model is better than its baselines"] = trusted
    points["the reward rose"] = _better(found.get("reward"))
    if reward is not None:
        within = "half of the rise is left between answers of equal length"
        points[within] = _at_equal_length(evidence)
    points[f"at most {EOS_MARGIN:.1%} of answers no longer end"] = _not_worse(
        found.get("eos_fraction"), EOS_MARGIN
    )
    if reward is not None:
        points[f"distinct-2 keeps {1 - VARIETY_MARGIN:.0%} of its value"] = _not_worse(
            found.get("distinct_2"), VARIETY_MARGIN
        )
    if evidence.judge:
        points[f"the judge ({evidence.judge}) gives more points"] = _better(found.get("judge"))
        good = found.get("judge_good")
        known = HOLDS if _is(good, BETTER) else NOT_TOLD_APART
        points["no fewer answers are fully good"] = BROKEN if _is(good, WORSE) else known
    near = evidence.kl < FAR_KL or evidence.kl_per_token < FAR_KL_PER_TOKEN
    if reward is not None and not evidence.judge:
        name = f"KL is below {FAR_KL:g} nats an answer or {FAR_KL_PER_TOKEN:g} a token"
        points[name] = HOLDS if near else NOT_SHOWN
    return points


def _better(comparison: Comparison | None) -> str:
    if _is(comparison, BETTER):
        return HOLDS
    return BROKEN if _is(comparison, WORSE) else NOT_SHOWN


def _not_worse(comparison: Comparison | None, margin: float) -> str:
    """Non-inferiority: it holds where the interval is above -margin. It is broken where more than
    the margin is gone, and not by chance."""
    if comparison is None:
        return NOT_SHOWN
    if comparison.shows_at_least(-margin):
        return HOLDS
    lost = comparison.outcome == WORSE and comparison.change < -margin
    return BROKEN if lost else NOT_SHOWN


def _at_equal_length(evidence: Evidence) -> str:
    """Broken where answers have another length and less than half of the gain can be left."""
    within, gain = evidence.found.get("reward_within_lengths"), evidence.found["reward"]
    least = LENGTH_SHARE * gain.change
    if within is None or within.high is None:
        return NOT_SHOWN
    if within.outcome == BETTER and within.change >= least:
        return HOLDS
    moved = evidence.found["length"].outcome in (HIGHER, LOWER)
    return BROKEN if moved and within.high < least else NOT_SHOWN


def _is(comparison: Comparison | None, outcome: str) -> bool:
    return comparison is not None and comparison.outcome == outcome


def _reward_model(evidence: Evidence, reward: RewardJudgement | None, points: Points) -> Found:
    if reward is None or reward.outcome != FAILS:
        return None
    why = f"the reward model is {FAILS}, so a rise of it means nothing: {reward.reason}"
    still = _still(evidence, reward, points)
    if still is not None:
        return NOT_ENOUGH, f"{why}; and {still[1]}", f"{reward.remedy}; then {still[2]}"
    return NOT_ENOUGH, why, reward.remedy


def _still(evidence: Evidence, reward: RewardJudgement | None, points: Points) -> Found:
    high = evidence.kl if evidence.kl_high is None else evidence.kl_high
    if abs(evidence.kl) >= STILL_KL or high >= 2 * STILL_KL:
        return None
    return (
        DID_NOT_LEARN,
        f"KL is {abs(evidence.kl):.3g} nats per answer: the policy did not move",
        "raise step3.actor.optim.learning_rate or step3.iterations",
    )


def _no_gain(evidence: Evidence, reward: RewardJudgement | None, points: Points) -> Found:
    gain = evidence.found["reward"]
    if gain.outcome == BETTER:
        return None
    if gain.outcome == WORSE:
        why = f"the reward fell by {-gain.change:.3f} ({_ends(gain)})"
        return DID_NOT_LEARN, why, "lower step3.actor.optim.learning_rate; look at metrics.jsonl"
    if gain.low is None or gain.high is None:
        why = "all answers are to one prompt, which leaves no interval"
        return NOT_ENOUGH, why, "bring more held-out prompts (data.eval_fraction, or a test file)"
    small = SMALL_GAIN * evidence.deviation
    if gain.high < small:
        why = (
            f"the reward changed by {number(gain.change, '+.3f')} ({_ends(gain)}), less than "
            f"{SMALL_GAIN:g} standard deviations ({small:.3f})"
        )
        raised = "raise step3.actor.optim.learning_rate or step3.iterations, or lower "
        return DID_NOT_LEARN, why, raised + "step3.ppo.kl_coef"
    change = f"{number(gain.change, '+.3f')} ({_ends(gain)})"
    why = f"the change of the reward, {change}, is not told apart from 0"
    return NOT_ENOUGH, why, _more_prompts(evidence, gain)


def _more_prompts(evidence: Evidence, gain: Comparison) -> str:
    """Prompts at which the interval is half as wide as the effect that is looked for."""
    half = ((gain.high or 0.0) - (gain.low or 0.0)) / 2
    wanted = max(abs(gain.change), SMALL_GAIN * evidence.deviation)
    if half <= 0 or wanted <= 0:
        return "evaluate on more prompts (step3.eval.prompts, data.eval_fraction)"
    needed = math.ceil(evidence.prompts * (half / wanted) ** 2 * 1.5 / 10) * 10
    return (
        f"evaluate on about {needed} different prompts, not {evidence.prompts} "
        "(step3.eval.prompts, data.eval_fraction), or train longer"
    )


_HACKS = {
    "no longer end": "answers no longer end",
    "distinct-2": "answers have lost their variety",
    "equal length": "the rise goes with the answers' length",
    "the judge": "the judge disagrees",
    "fully good": "fewer answers are fully good",
}
_LESS = "raise step3.ppo.kl_coef or stop earlier (step3.iterations), and {}; "
_BETTER_MODEL, _BETTER_SUM = "make the reward model judge this better", "let a reward count this"


def _hacked(evidence: Evidence, reward: RewardJudgement | None, points: Points) -> Found:
    broken = [point for point, state in points.items() if state == BROKEN]
    said = [words for key, words in _HACKS.items() if any(key in point for point in broken)]
    if not said:
        return None
    remedy = _LESS.format(_BETTER_SUM if reward is None else _BETTER_MODEL)
    if said[0] == "answers no longer end":
        remedy += "step3.ppo.missing_eos_penalty"
    elif "length" in said[0]:
        remedy += "balance the lengths of its pairs"
    return HACKED, f"the reward rose, but {' and '.join(said)}", remedy.rstrip("; ")


def _not_shown(evidence: Evidence, reward: RewardJudgement | None, points: Points) -> Found:
    open_points = [point for point, state in points.items() if state == NOT_SHOWN]
    if not open_points:
        return None
    remedy = _more_prompts(evidence, evidence.found["reward"])
    if any("judge" in point for point in open_points):
        who = "the reward" if reward is None else "reward model"
        remedy = f"read the samples: {who} and judge may want different things"
    elif any(point.startswith("KL") for point in open_points):
        remedy = "give a judge (step3.eval.judge), or raise step3.ppo.kl_coef"
    elif evidence.found["reward"].change > 0:
        remedy = "evaluate on more different prompts (step3.eval.prompts, data.eval_fraction)"
    return NOT_ENOUGH, f"the reward rose, but this is not shown: {'; '.join(open_points)}", remedy


def _ends(comparison: Comparison) -> str:
    if comparison.low is None or comparison.high is None:
        return "one prompt, no interval"
    return f"95% interval {number(comparison.low, '+.3f')} to {number(comparison.high, '+.3f')}"
