"""rlhf.evaluation.verdict: checks, text and exit codes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf.evaluation.verdict import build_verdict, main, render
from tests.unit.driver_help import make_artifact, make_evaluation

FIGURES = {
    "answers": 100.0, "reward": 0.0, "reward_ci": 0.2, "reward_std": 2.0, "kl": 0.0, "kl_ci": 0.1,
    "length": 9.0, "eos_fraction": 0.97, "distinct_2": 0.5, "judge": 1.0, "judge_ci": 0.1,
    "judge_good": 0.3,
}  # fmt: skip
GOOD = {"reward": 3.0, "kl": 8.0, "judge": 1.5, "judge_good": 0.4}


def verdict(ppo: dict[str, float] | None = None, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "models": {"sft": FIGURES, "ppo": FIGURES | GOOD | (ppo or {})},
        "gain": (3.0, 0.5),
        "samples": [{"prompt": "\n\nHuman: Hi\n\nAssistant:", "sft": "No.", "ppo": "Hello!"}],
        "sft": {"perplexity": 2.5},
        "reward": {"accuracy": 0.93},
        "judge": "courtesy",
    }
    return build_verdict(**(arguments | changes))


def failed(found: dict[str, Any]) -> list[str]:
    return [check for check, passed in found["checks"].items() if not passed]


def test_a_good_run() -> None:
    found = verdict()
    assert found["learned"]
    assert len(found["checks"]) == 6
    assert (found["gain"], found["gain_ci"], found["gain_in_sft_std"]) == (3.0, 0.5, 1.5)
    text = render(found)
    for part in (
        "2.500",
        "0.9300",
        "+3.000 +- 0.500",
        "1.50 SFT standard",
        "It learned: 6 of 6",
        "100 answers to held-out prompts",
        "judge (courtesy)",
        "'Hello!'",
        "3.000 +- 0.200",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("ppo", "changes", "check"),
    [
        ({}, {"gain": (0.4, 0.5)}, "reward rose"),
        ({}, {"gain": (0.4, math.nan)}, "reward rose"),
        ({"kl": 15.0}, {}, "below 15 nats"),
        ({"kl": math.nan}, {}, "below 15 nats"),
        ({"eos_fraction": 0.949}, {}, "still end"),
        ({"distinct_2": 0.399}, {}, "stay varied"),
        ({"judge": 1.0}, {}, "judge (courtesy) agrees"),
        ({"judge_good": 0.3}, {}, "fully good"),
    ],
)
def test_each_check_can_fail(ppo: dict[str, float], changes: dict[str, Any], check: str) -> None:
    """Issue 2's bounds: gain beyond its interval, KL < 15, EOS - 0.02, distinct-2 x 0.8, judge."""
    found = verdict(ppo, **changes)
    assert len(failed(found)) == 1
    assert check in failed(found)[0]
    assert not found["learned"]
    assert "did NOT learn" in render(found)
    assert "5 of 6" in render(found)


def test_limits_are_inclusive() -> None:
    assert verdict({"eos_fraction": 0.97 - 0.02, "distinct_2": 0.4})["learned"]


def test_without_judge_and_parents() -> None:
    """Foreign models have no manifest: their lines are left out."""
    figures = {k: v for k, v in FIGURES.items() if not k.startswith("judge")}
    found = verdict(
        models={"sft": figures, "ppo": figures | {"reward": 3.0}}, sft={}, reward={}, judge=None,
        samples=[],
    )  # fmt: skip
    assert len(found["checks"]) == 4
    text = render(found)
    assert "perplexity" not in text
    assert "judge" not in text


def saved(tmp_path: Path, found: dict[str, Any]) -> str:
    make_artifact(tmp_path, 3, {})
    make_evaluation(tmp_path, "", found)
    return str(tmp_path)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m rlhf.evaluation.verdict`: 0 all hold, 1 something fails and is named."""
    run = saved(tmp_path, verdict())
    assert main([run]) == 0
    assert "VERDICT" in capsys.readouterr().out
    assert main([run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gain"] == 3.0
    assert main([run, "--min-accuracy", "0.93", "--min-gain", "1.5"]) == 0
    assert main([run, "--min-accuracy", "0.94"]) == 1
    assert "0.93 < 0.94" in capsys.readouterr().err
    assert main([run, "--min-gain", "1.6"]) == 1
    assert "1.500 < 1.6" in capsys.readouterr().err
    assert main([saved(tmp_path, verdict({"kl": 16.0}))]) == 1
    assert "failed: KL" in capsys.readouterr().err
    assert main([saved(tmp_path, verdict(reward={})), "--min-accuracy", "0.5"]) == 1


def test_a_run_without_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 3
    assert "python train.py --step 3" in capsys.readouterr().err
    make_artifact(tmp_path, 3, {})
    assert main([str(tmp_path)]) == 3
    assert "python train.py evaluate" in capsys.readouterr().err


def test_one_held_out_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Intervals of one answer are NaN, which JSON keeps as text: printed all the same."""
    nan = {"reward_ci": math.nan, "kl_ci": math.nan, "judge_ci": math.nan, "answers": 1.0}
    found = verdict(
        models={"sft": FIGURES | nan, "ppo": FIGURES | GOOD | nan}, gain=(3.0, math.nan)
    )
    assert main([saved(tmp_path, found)]) == 1
    out = capsys.readouterr()
    assert "+3.000 +- nan" in out.out
    assert "reward rose" in out.err
    nothing = verdict(gain=(math.nan, math.nan))
    assert main([saved(tmp_path, nothing), "--min-gain", "0.5"]) == 1
    assert "SFT std" in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    """The driver's `.ci/run` and a login node read verdicts."""
    import subprocess
    import sys

    code = "import sys, rlhf.evaluation.verdict; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
