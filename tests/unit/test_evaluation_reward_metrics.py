"""rlhf.evaluation.reward_metrics and reward_model by hand (11, 40)."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf.evaluation import reward_metrics
from rlhf.evaluation.reward_model import FAILS, PASSES, UNKNOWN, judge_reward_model
from tests.unit.driver_help import write_model


def pair_metrics(*columns: Any, prompts: Any = None) -> dict[str, float]:
    """Each pair has a prompt of its own unless it is said otherwise."""
    return reward_metrics.pair_metrics(*columns, prompts or list(range(len(columns[0]))))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_accuracy_margin_and_loss() -> None:
    """Equal scores count half; the loss is -log sigmoid(margin), also where exp overflows."""
    found = pair_metrics([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 3.0, 1.0], [1] * 4, [1] * 4)
    assert found["accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert found["margin"] == pytest.approx((1 + 0 - 3 + 4) / 4)
    assert found["loss"] == pytest.approx(sum(-math.log(sigmoid(m)) for m in (1, 0, -3, 4)) / 4)
    assert found["pairs"] == 4.0
    extreme = pair_metrics([0.0, 2000.0], [1000.0, 0.0], [1, 1], [1, 1])
    assert extreme["loss"] == pytest.approx(500.0)


def test_accuracy_by_length() -> None:
    """A model that always prefers the longer answer shows: 1 where chosen is longer, else 0."""
    chosen_lengths, rejected_lengths = [9, 9, 2, 3, 5], [4, 8, 6, 7, 5]
    scores = [float(n) for n in chosen_lengths], [float(n) for n in rejected_lengths]
    found = pair_metrics(*scores, chosen_lengths, rejected_lengths)
    assert found["accuracy_chosen_longer"] == 1.0
    assert found["accuracy_chosen_shorter"] == 0.0
    assert found["accuracy_equal_length"] == 0.5  # a tie
    # Mean lengths 6.5, 8.5, 4, 5, 5: thirds cut at 5 and 6.5.
    assert found["accuracy_short_answers"] == 0.0  # 4
    assert found["accuracy_middle_answers"] == 0.25  # 5 wrong, 5 a tie
    assert found["accuracy_long_answers"] == 1.0  # 6.5, 8.5
    assert "accuracy_chosen_longer" not in pair_metrics([1.0], [0.0], [1], [2])


def test_calibration() -> None:
    """Each pair in both orders, ten bins (Guo et al. 2017, eq. 3)."""
    # Always 0.88 sure and always right: the bins of 0.88 and 0.12 are both 0.12 off.
    sure = pair_metrics([2.0] * 3, [0.0] * 3, [1] * 3, [1] * 3)
    assert sure["calibration_error"] == pytest.approx(1 - sigmoid(2.0))
    # Right 3 times of 4 at sigmoid(log 3) = 0.75: perfectly calibrated.
    margin = math.log(3)
    even = pair_metrics([margin, margin, margin, 0.0], [0.0, 0.0, 0.0, margin], [1] * 4, [1] * 4)
    assert even["calibration_error"] == pytest.approx(0.0, abs=1e-12)
    # No opinion: 0.5 predicted, 0.5 right.
    none = pair_metrics([0.0], [0.0], [1], [1])
    assert none["calibration_error"] == pytest.approx(0.0)
    # Margin 0.1 (p = 0.525) right, 4 (q = 0.982) wrong: four cases in four bins, in both orders
    # 1 - p off and q off.
    p, q = sigmoid(0.1), sigmoid(4.0)
    mixed = pair_metrics([0.1, 0.0], [0.0, 4.0], [1, 1], [1, 1])
    assert mixed["calibration_error"] == pytest.approx((2 * (1 - p) + 2 * q) / 4)


def test_nothing_held_out() -> None:
    assert pair_metrics([], [], [], []) == {}


def drawn(skill: float, longer: float = 0.0, scale: float = 1.0, seed: int = 0) -> dict[str, float]:
    """400 pairs of 100 prompts. `skill`: what a margin knows; `longer`: what length adds to it."""
    rng = random.Random(seed)
    prompts = [i % 100 for i in range(400)]
    chosen_lengths = [rng.randrange(10, 60) for _ in prompts]
    rejected_lengths = [rng.randrange(10, 50) for _ in prompts]
    lengths = list(zip(chosen_lengths, rejected_lengths, strict=True))
    scores = [
        scale * (skill + rng.gauss(0, 1) * (longer == 0) + longer * (c - r)) for c, r in lengths
    ]
    return pair_metrics(scores, [0.0] * 400, chosen_lengths, rejected_lengths, prompts=prompts)


def test_intervals_are_over_prompts() -> None:
    """Four copies of each pair say no more than the pair: the interval stays, the naive shrinks."""
    rng = random.Random(3)
    margins = [rng.gauss(0.5, 1) for _ in range(50)]
    once = pair_metrics(margins, [0.0] * 50, [1] * 50, [1] * 50)
    four = pair_metrics(margins * 4, [0.0] * 200, [1] * 200, [1] * 200, prompts=list(range(50)) * 4)
    for name in ("accuracy", "accuracy_low", "accuracy_high", "loss_low", "loss_high"):
        assert four[name] == pytest.approx(once[name], abs=1e-9)
    assert (four["pairs"], four["prompts"]) == (200.0, 50.0)
    alone = pair_metrics([1.0, 2.0], [0.0, 0.0], [1, 1], [1, 1], prompts=[7, 7])
    assert "accuracy_low" not in alone


def test_a_coin_does_not_pass() -> None:
    """Random labels: it passes in at most 2.5% of draws, and the reason names the coin."""
    judged = [judge_reward_model(drawn(0.0, scale=0.2, seed=seed)) for seed in range(400)]
    passed = sum(one.outcome == PASSES for one in judged)
    assert passed <= 17  # 99% of draws at 2.5%
    assert sum("coin" in one.reason for one in judged) > 350
    assert all(one.remedy for one in judged if one.outcome == FAILS)


def test_a_good_one_passes() -> None:
    found = judge_reward_model(drawn(1.5))
    assert found.outcome == PASSES
    assert found.remedy == ""
    assert "accuracy 0.9" in found.reason


def test_length_alone_does_not_pass() -> None:
    """It prefers the longer answer and nothing else: no better than the baseline."""
    metrics = drawn(0.0, longer=0.02)
    assert metrics["accuracy"] > 0.55
    assert metrics["length_baseline"] == pytest.approx(metrics["accuracy"], abs=0.02)
    found = judge_reward_model(metrics)
    assert found.outcome == FAILS
    assert "length alone" in found.reason


def test_a_loss_above_ln_2_does_not_pass() -> None:
    """Mostly right and far too sure: the issue's 0.568 with loss 1.19 is of this kind."""
    metrics = drawn(0.5, scale=8.0)
    assert metrics["accuracy"] > 0.65
    assert metrics["loss"] > math.log(2)
    assert "ln 2" in judge_reward_model(metrics).reason
    issue = {"accuracy": 0.568, "accuracy_low": 0.51, "accuracy_high": 0.62, "loss": 1.19}
    assert judge_reward_model(issue).outcome == FAILS


def test_leaning_on_length_is_a_warning() -> None:
    metrics = drawn(1.5) | {"accuracy_chosen_shorter": 0.33, "accuracy_chosen_shorter_high": 0.42}
    found = judge_reward_model(metrics)
    assert found.outcome == PASSES
    assert "0.330 where the chosen answer is shorter" in found.reason


@pytest.mark.parametrize("metrics", [{}, {"accuracy": 0.9}, {"accuracy": "NaN"}])
def test_what_was_not_measured_is_unknown(metrics: dict[str, Any]) -> None:
    assert judge_reward_model(metrics).outcome == UNKNOWN


def test_the_driver_says_it_before_step_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward model that is there and no better than a coin; one without an interval."""
    from launch.checklist import Asking, _reward_model
    from launch.options import parse_options
    from launch.plan import make_plan
    from rlhf.store import publish

    model = write_model(tmp_path / "reward")
    argv = ["--step", "3", "--actor-model", str(model), "--reward-model", str(model)]
    (found,) = _reward_model(Asking(make_plan(parse_options(argv)), "dry-run"))
    assert (found.state, found.found.split(":")[0]) == ("warn", "unknown")
    publish(
        tmp_path / "made",
        lambda to: shutil.copytree(model, to, dirs_exist_ok=True) and None,
        kind="reward", step=2, parents={}, data_fingerprint="d" * 64,
        tokenizer_fingerprint="t" * 64, config={}, metrics=drawn(0.0, scale=0.2),
    )  # fmt: skip
    argv[-1] = str(tmp_path / "made" / "artifact")
    (found,) = _reward_model(Asking(make_plan(parse_options(argv)), "dry-run"))
    assert found.state == "warn"
    assert "coin" in found.line()
    assert "bring more" in found.line()
