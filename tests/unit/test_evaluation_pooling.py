"""One verdict over the runs of several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ConfigError
from rlhf.evaluation import seeds
from rlhf.evaluation.pooling import pool, render_pooled
from rlhf.store import read_json
from tests.unit.driver_help import make_artifact, make_evaluation


def verdict(gain: float, outcome: str = "learned", **ppo: float) -> dict[str, Any]:
    models = {"sft": {"reward": 0.0, "kl": 0.0}, "ppo": {"reward": gain, "kl": 2.0, **ppo}}
    return {"gain": gain, "outcome": outcome, "gain_in_sft_std": gain / 2, "models": models}


def test_by_hand() -> None:
    """1, 2, 3: mean 2, s 1, t(2) 4.303: 4.303 / sqrt(3) = 2.484."""
    found = pool([verdict(1.0), verdict(2.0), verdict(3.0, "not enough evidence")])
    assert (found["gain"], found["learned"], found["runs"]) == (2.0, 2, 3)
    assert found["gain_high"] - found["gain"] == pytest.approx(2.484, abs=1e-3)
    assert found["gain_in_sft_std"][2] - 1.0 == pytest.approx(1.242, abs=1e-3)
    assert found["outcome"] == "not enough evidence"  # the interval over runs has 0 in it


@pytest.mark.parametrize(
    ("outcomes", "gains", "pooled"),
    [
        (["learned"] * 4, [2.0, 2.1, 1.9, 2.0], "learned"),
        (["learned"] * 3 + ["did not learn"], [2.0, 2.1, 1.9, 1.0], "learned"),
        (["learned"] * 3 + ["hacked the reward"], [2.0, 2.1, 1.9, 2.0], "not enough evidence"),
        (["learned", "learned", "did not learn", "did not learn"], [2.0, 2.1, 0.0, 0.0], "not e"),
        (["learned", "hacked the reward"], [2.0, 2.1], "hacked the reward"),
        (["did not learn", "not enough evidence"], [0.0, 0.1], "did not learn"),
        (["not enough evidence"] * 3, [2.0, 2.1, 1.9], "not enough evidence"),
    ],
)
def test_the_pooled_outcome(outcomes: list[str], gains: list[float], pooled: str) -> None:
    found = pool([verdict(g, o) for g, o in zip(gains, outcomes, strict=True)])
    assert found["outcome"].startswith(pooled)
    text = render_pooled(found)
    assert text.startswith(f"VERDICT over {len(gains)} seeds: {pooled.upper()}")
    assert all(len(line) <= 110 for line in text.splitlines())


def test_what_a_run_lacks_is_absent() -> None:
    found = pool([verdict(1.0, judge=2.0), verdict(2.0)])
    assert "judge" not in found["models"]["ppo"]
    both = pool([verdict(1.0, judge=2.0), verdict(2.0, judge=4.0)])
    assert both["models"]["ppo"]["judge"][0] == 3.0
    assert "base" not in both["models"]


def test_one_run_is_none() -> None:
    with pytest.raises(ConfigError, match="two or more"):
        pool([verdict(1.0)])


def test_coverage() -> None:
    """Over many draws of four runs, the interval holds the truth in 95%."""
    import random

    draw = random.Random(0)
    hits = 0
    for _ in range(4000):
        found = pool([verdict(draw.gauss(1.0, 0.5)) for _ in range(4)])
        hits += abs(found["gain"] - 1.0) <= found["gain_high"] - found["gain"]
    assert 0.94 < hits / 4000 < 0.96


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for number, gain in enumerate((1.0, 1.1)):
        run = tmp_path / f"x-seed{number}"
        make_artifact(run, 3, {"seed": number})
        make_evaluation(run, "", verdict(gain))
        runs.append(str(run))
    assert seeds.main([*runs, "--write", str(tmp_path / "x-seeds")]) == 0
    out = capsys.readouterr().out
    assert "VERDICT over 2 seeds" in out
    found = read_json(tmp_path / "x-seeds" / "verdict.json")
    assert found["runs"] == 2
    assert found["gain"] == pytest.approx(1.05)
    assert found["directories"] == runs
    text = (tmp_path / "x-seeds" / "verdict.txt").read_text()
    assert text == render_pooled(pool([verdict(1.0), verdict(1.1)]))
    assert seeds.main([*runs, str(tmp_path)]) == 3
    assert "python train.py --step 3" in capsys.readouterr().err
