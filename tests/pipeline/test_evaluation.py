"""A run that is killed between publishing and its verdict, as a user would see it; and the command
that evaluates again, on two ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.store import RunDir, find_evaluation, read_manifest, verify
from tests.pipeline.test_two_ranks import SETTINGS, write_rows
from tests.unit import model_help as help_
from tests.unit.test_launch_supervise import wait_for

JUDGE = """
import os, pathlib, time

def slow_once(prompts, answers, ended):
    here = pathlib.Path(os.environ["JUDGING"])
    if not here.exists():
        here.write_text("now")
        time.sleep(600)
    return [len(answer) for answer in answers]
"""

GENERATING = re.compile(r"answers of each model to \d+ held-out prompts")


def start(root: Path, *argv: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"PYTHONPATH": str(root), "JUDGING": str(root / "judging")}
    command = [sys.executable, str(help_.ROOT / "train.py"), *argv]
    return subprocess.Popen(
        command, cwd=root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=280)
    return process.returncode, out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    write_rows(path / "data")
    (path / "lengths.py").write_text(JUDGE)
    return path


def test_a_kill_before_the_verdict_is_made_up_for(root: Path) -> None:
    """SIGKILL of the driver while the judge works: the policy is there and stays as it is; the same
    command only evaluates, without generating again."""
    argv = [
        "--output-dir", str(root), "--name", "one", "--actor-model", help_.tiny(),
        "--data-path", str(root / "data"), f"data.cache_dir={root / 'cache'}",
        "step3.eval.judge=lengths:slow_once", *SETTINGS,
    ]  # fmt: skip
    driver, run = start(root, *argv), RunDir(root / "one")
    assert wait_for((root / "judging").exists, 280)
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    policy = verify(run.artifact("ppo"), "ppo")
    assert find_evaluation(run) == (None, "it has not been evaluated")

    code, out = finish(start(root, *argv))
    assert code == 0, out
    assert "step 3 is done, but it has not been evaluated: its evaluation starts" in out
    assert not GENERATING.search(out), "the answers of the killed run were there"
    assert out.count("already done") == 3
    now = verify(run.artifact("ppo"), "ppo")
    assert now.content_id == policy.content_id
    assert set(now.metrics["evaluation"]) == {"base", "sft", "ppo", "ema"}
    assert find_evaluation(run)[0] is not None


def test_evaluate_again_on_two_ranks(root: Path) -> None:
    """More prompts, another judge, other processes: every rank count gives the same prompts."""
    run = RunDir(root / "one")
    code, out = finish(
        start(root, "evaluate", str(run.path), "--prompts", "13", "--num-gpus", "2",
              "--judge", "lengths:slow_once")
    )  # fmt: skip
    assert code == 0, out
    assert GENERATING.search(out)
    lines = (run.artifact("evaluation") / "answers.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    prompts = {name: [r["prompt"] for r in rows if r["model"] == name] for name in ("sft", "ema")}
    assert prompts["sft"] == prompts["ema"]
    assert len(set(prompts["sft"])) == len(prompts["sft"]) == 13
    assert (run.logs(3) / "rank1.log").is_file()
    assert read_manifest(run.artifact("ppo")).metrics["evaluation"]["ppo"]["answers"] == 13
