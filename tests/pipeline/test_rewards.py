"""Your own reward function, as a user starts it: steps 1 and 3, and what it teaches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.store import read_json, verify
from rlhf.track import read_metrics

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = """
import random

def short(prompts, answers):
    return [-len(answer) / 20 for answer in answers]

def chance(prompts, answers):
    return [random.gauss(0, 1) for _ in answers]
"""
SETTINGS = [
    "step1.train.max_steps=300", "step1.train.epochs=2", "data.split=4,0,6",
    "step3.iterations=20", "step3.eval.prompts=16", "track.trackers=[]",
]  # fmt: skip


def train(place: Path, name: str, *arguments: str) -> Path:
    env = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, str(ROOT / "train.py"), "--config", "tiny_cpu", "--name", name,
        "--output-dir", str(place / "output"), *SETTINGS, *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return place / "output" / name


def lengths(run: Path) -> tuple[float, float]:
    """Tokens per answer in the first and in the last three iterations."""
    rows: list[Any] = list(read_metrics(run / "step3_ppo" / "metrics.jsonl"))
    found = [row["answer_length"] for row in rows]
    assert len(found) == 20
    return sum(found[:3]) / 3, sum(found[-3:]) / 3


@pytest.mark.slow
def test_short_answers_are_learned_and_random_rewards_teach_nothing(tmp_path: Path) -> None:
    """Without a reward model; the null starts from the same SFT model."""
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    run = train(tmp_path, "short", "step3.rewards=my_rewards:short")
    assert not (run / "step2_reward").exists()
    assert sorted(verify(run / "step3_ppo" / "artifact", "ppo").parents) == ["sft"]
    before, after = lengths(run)
    assert after < 0.6 * before
    verdict = read_json(run / "step3_ppo" / "evaluation" / "verdict.json")
    assert verdict["comparisons"]["ppo"]["reward"]["outcome"] == "better"
    actor = ["--step", "3", "--actor-model", str(run / "step1_sft" / "artifact")]
    null = train(tmp_path, "chance", *actor, "step3.rewards=my_rewards:chance")
    before, after = lengths(null)
    assert after == pytest.approx(before, rel=0.2)
    verdict = read_json(null / "step3_ppo" / "evaluation" / "verdict.json")
    assert verdict["outcome"] != "learned"
