"""rlhf.evaluation.verdict, rules, render: outcomes on planted cases, text, exit codes."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import HeldOut
from rlhf.evaluation.simulate import (
    GOOD_REWARD,
    Case,
    PlantedJudge,
    Policy,
    cases,
    draw_answers,
    draw_verdict,
    error_rates,
)
from rlhf.evaluation.verdict import build_verdict, main, render
from tests.unit.driver_help import make_artifact, make_evaluation

CASES = {case.name: case for case in cases()}
DRAWS = 80


def drawn(name: str = "better by 1.2 SD", prompts: int = 100, seed: int = 1) -> dict[str, Any]:
    return draw_verdict(random.Random(seed), CASES[name], 128, prompts)


def answers(policy: Policy, prompts: int = 100) -> dict[str, Any]:
    rng = random.Random(5)
    effects = [tuple(rng.gauss(0, 1) for _ in range(4)) for _ in range(prompts)]
    asked = [i % prompts for i in range(128)]
    return {
        "sft": draw_answers(rng, Policy(kl=0.0), asked, effects),
        "ppo": draw_answers(rng, policy, asked, effects),
    }


def built(models: dict[str, Any], **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "held_out": HeldOut(rows=400, prompts=100, seen=0), "sft": {"perplexity": 2.5},
        "reward": GOOD_REWARD, "judge": PlantedJudge(), "samples": 2,
    }  # fmt: skip
    return build_verdict(models, **(arguments | changes))


@pytest.mark.parametrize("prompts", [100, 20])
@pytest.mark.parametrize("name", [case.name for case in cases() if case.truth == "no"])
def test_what_has_not_learned(name: str, prompts: int) -> None:
    """At most 2.5% are called `learned`: of 80 draws at most 7 (99.9% of such sets of draws).
    docs/verdict.md has the rates of 2,000."""
    assert error_rates(CASES[name], DRAWS, 128, prompts)["learned"] <= 7


@pytest.mark.parametrize("prompts", [100, 20])
@pytest.mark.parametrize(
    "name", ["better by 0.6 SD", "better by 1.2 SD", "better by 1.2 SD, no judge"]
)
def test_what_has_learned(name: str, prompts: int) -> None:
    found = error_rates(CASES[name], DRAWS, 128, prompts)
    assert found["learned"] > 0.85 * DRAWS
    assert found["hacked the reward"] + found["did not learn"] <= 3


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("one rewarded token repeated", "lost their variety"),
        ("no answer ends", "no longer end"),
        ("the judge sees a loss", "the judge disagrees"),
        ("longer only, no judge", "answers' length"),
    ],
)
def test_hacks_are_named(name: str, why: str) -> None:
    """Most draws, and the rule says which hack it is."""
    found = [drawn(name, seed=seed) for seed in range(30)]
    hacked = [v for v in found if v["outcome"] == "hacked the reward"]
    assert len(hacked) > 15
    assert all(why in v["decisions"]["ppo"]["rule"] for v in hacked)
    assert all("step3.ppo.kl_coef" in v["decisions"]["ppo"]["next"] for v in hacked)


def test_a_policy_that_did_not_move() -> None:
    """The same answers: every change is 0, and KL says why."""
    same = answers(Policy())["sft"]
    found = built({"sft": same, "ppo": same})
    assert found["outcome"] == "did not learn"
    assert "did not move" in found["decisions"]["ppo"]["rule"]
    assert "step3.actor.optim.learning_rate" in found["decisions"]["ppo"]["next"]
    assert found["gain"] == 0.0


def test_a_fall() -> None:
    found = built(answers(Policy(gain=-1.2)))
    assert found["outcome"] == "did not learn"
    assert "fell by" in found["decisions"]["ppo"]["rule"]


def test_too_few_prompts() -> None:
    """Not told apart and not small either: how many prompts would do is said."""
    few = {name: rows[:3] for name, rows in answers(Policy()).items()}
    for name, scores in (("sft", (0.0, 1.0, 2.0)), ("ppo", (1.0, 0.9, 3.2))):
        few[name] = [replace(r, score=s) for r, s in zip(few[name], scores, strict=True)]
    found = built(few)
    assert found["outcome"] == "not enough evidence"
    assert "different prompts, not 3" in found["decisions"]["ppo"]["next"]
    one = {name: rows[:1] for name, rows in few.items()}
    assert "one prompt" in built(one)["decisions"]["ppo"]["rule"]
    render(built(one))


def test_no_run_on_a_bad_reward_model_has_learned() -> None:
    good = answers(Policy(gain=1.2, judge_gain=1.2))
    assert built(good)["outcome"] == "learned"
    coin = GOOD_REWARD | {"accuracy": 0.52, "accuracy_low": 0.47, "accuracy_high": 0.57}
    found = built(good, reward=coin)
    assert found["outcome"] == "not enough evidence"
    assert "coin" in found["decisions"]["ppo"]["rule"]
    foreign = built(good, reward={})
    assert foreign["outcome"] == "learned"
    assert "[--] the reward model is better than its baselines: unknown" in render(foreign)


def test_a_bad_reward_model_and_a_policy_that_did_not_move() -> None:
    """Both remedies are said: mended pairs alone would leave the policy where it is."""
    same = answers(Policy())["sft"]
    coin = GOOD_REWARD | {"accuracy": 0.52, "accuracy_low": 0.47, "accuracy_high": 0.57}
    decision = built({"sft": same, "ppo": same}, reward=coin)["decisions"]["ppo"]
    assert decision["outcome"] == "not enough evidence"
    assert "coin" in decision["rule"]
    assert "did not move" in decision["rule"]
    assert "look at the pairs" in decision["next"]
    assert "raise step3.actor.optim.learning_rate" in decision["next"]


def test_fully_good_answers_that_are_not_told_apart() -> None:
    """It stands in the way of nothing, and it is not said to hold."""
    models = answers(Policy(gain=1.2, judge_gain=1.2))
    # Each model's judge points rise, but none is over the border of fully good.
    low = {
        name: [replace(r, judge=min(r.judge or 0.0, 0.9)) for r in rows]
        for name, rows in models.items()
    }
    found = built(low)
    assert found["comparisons"]["ppo"]["judge_good"]["outcome"] == "not told apart"
    assert found["outcome"] == "learned"
    point = "no fewer answers are fully good: not told apart"
    assert f"[--] {point}" in render(found)
    rule = found["decisions"]["ppo"]["rule"]
    assert f"and every other point holds ({point})" in rule
    assert "and every point holds" in built(models)["decisions"]["ppo"]["rule"]


def test_no_figure_is_minus_zero() -> None:
    """KL and changes of less than is printed have no sign; the two distinct-2 have two names."""
    models = answers(Policy(gain=1.2, judge_gain=1.2))
    models["sft"] = [replace(r, kl=-1e-9) for r in models["sft"]]
    models["ema"] = models["sft"]
    found = built(models)
    found["gain"] = -1e-9
    text = render(found)
    assert not re.search(r"-0\.?0*(?![\d.])", text), text
    assert "gain PPO over SFT  +0.000" in text
    assert text.count("distinct-2 at equal size") == text.count("distinct-2 of all") == 1


def test_far_from_the_reference() -> None:
    """Without a judge, nothing vouches for the reward there; a judge does."""
    far = answers(Policy(gain=1.2, judge_gain=1.2, kl=60.0))
    assert built(far)["outcome"] == "learned"
    assert built(far, judge=None)["outcome"] == "not enough evidence"
    assert "step3.eval.judge" in built(far, judge=None)["decisions"]["ppo"]["next"]


def test_the_text() -> None:
    models = answers(Policy(gain=1.2, judge_gain=1.2))
    models["ema"], models["base"] = models["sft"], models["ppo"]
    found = built(models, sft={"perplexity": 2.5, "perplexity_before": 40.0})
    text = render(json.loads(json.dumps(found, sort_keys=True)))
    assert text == render(found)  # read back from a file with sorted keys
    marked = [line.split("] ")[1] for line in text.splitlines() if line.startswith("  [")]
    assert marked == [f"{point}: {state}" for point, state in found["decisions"]["ppo"]["points"]]
    assert "the reward model" in marked[0]
    lines = text.splitlines()
    assert lines[1] == "VERDICT: LEARNED"
    assert all(len(line) <= 100 for line in lines if ": '" not in line)
    for part in (
        "128 answers of each model to 100 prompts, none of them seen in training",
        "2.500  (before training 40.000)", "judge (planted)", "at equal length",
        "All intervals are 95%", "[ok] the reward rose: holds", "(ema): did not learn",
    ):  # fmt: skip
        assert part in text, part
    table = next(i for i, line in enumerate(lines) if line.startswith("  model"))
    assert [line.split()[0] for line in lines[table + 1 : table + 5]] == [
        "base", "sft", "ppo", "ema",
    ]  # fmt: skip
    prompts = [sample["prompt"] for sample in found["samples"]]
    assert prompts == ["prompt 0", "prompt 1"]


@pytest.mark.parametrize(
    ("seen", "said"),
    [(20, "all seen in training"), (7, "training has seen 7"), (0, "none of them")],
)
def test_prompts_seen_in_training(seen: int, said: str) -> None:
    found = built(answers(Policy(), prompts=20), held_out=HeldOut(rows=400, prompts=20, seen=seen))
    assert "128 answers of each model to 20 prompts" in render(found)
    assert said in render(found)


def test_other_prompts_are_refused() -> None:
    models = answers(Policy())
    models["ppo"] = [replace(models["ppo"][0], prompt="another"), *models["ppo"][1:]]
    with pytest.raises(ValueError, match="different prompts"):
        built(models)


def saved(run: Path, found: dict[str, Any]) -> str:
    make_artifact(run, 3, {})
    make_evaluation(run, "", found)
    return str(run)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m rlhf.evaluation.verdict`: 0 learned, 1 not, with the rule."""
    run = saved(tmp_path / "good", built(answers(Policy(gain=1.2, judge_gain=1.2))))
    assert main([run]) == 0
    assert "VERDICT: LEARNED" in capsys.readouterr().out
    assert main([run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "learned"
    assert main([run, "--min-accuracy", "0.95", "--min-gain", "0.5"]) == 0
    assert main([run, "--min-accuracy", "0.96"]) == 1
    assert "0.95 < 0.96" in capsys.readouterr().err
    assert main([run, "--min-gain", "9"]) == 1
    assert "< 9.0 SFT std" in capsys.readouterr().err
    bad = saved(tmp_path / "bad", drawn("no answer ends"))
    assert main([bad]) == 1
    assert "failed: hacked the reward: the reward rose, but" in capsys.readouterr().err
    foreign = built(answers(Policy(gain=1.2, judge_gain=1.2)), reward={})
    assert main([saved(tmp_path / "foreign", foreign), "--min-accuracy", "0.5"]) == 1
    assert "unknown < 0.5" in capsys.readouterr().err
    old = saved(tmp_path / "old", {"learned": True, "checks": {}})
    assert main([old]) == 3
    assert "older release" in capsys.readouterr().err


def test_a_run_without_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 3
    assert "error: " in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    """The driver's `.ci/run` and a login node read verdicts."""
    code = "import sys, rlhf.evaluation.verdict, rlhf.evaluation.seeds; "
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_simulation_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    from rlhf.evaluation import simulate

    simulate.main(["--draws", "1"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 2 * len(CASES)
    assert isinstance(cases()[0], Case)
