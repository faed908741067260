"""A rank that gets nowhere writes its stacks and ends; the driver says why (issue 11)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launch.failure import explain, read_records
from launch.spec import PROJECT_ROOT
from launch.supervise import Outcome
from rlhf.config.schema import ResolvedStep, RunConfig
from rlhf.stages import SFT

STEP = """
import sys, time
sys.path.insert(0, {root!r})
from rlhf import stall
from rlhf.harness import run_step

def a_judge_that_never_answers():
    time.sleep(600)

def main(run):
    with run.phase("evaluate"):
        for _ in range({marks}):
            time.sleep(0.2)
            stall.mark()
        {then}

run_step(1, main)
"""


def start(tmp_path: Path, limit: float, marks: int, then: str) -> subprocess.Popen[str]:
    config = RunConfig.model_validate({"launch": {"stall_timeout": limit}})
    place = tmp_path / "resolved.json"
    place.write_text(ResolvedStep(step=1, run_dir=str(tmp_path), config=config).model_dump_json())
    code = textwrap.dedent(STEP).format(root=str(PROJECT_ROOT), marks=marks, then=then)
    return subprocess.Popen(
        [sys.executable, "-c", code, "--config", str(place)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_hang_ends_with_its_stack_and_its_cause(tmp_path: Path) -> None:
    rank = start(tmp_path, 3.0, 2, "a_judge_that_never_answers()")
    shown, _ = rank.communicate(timeout=120)
    assert rank.returncode == 1, shown
    logs = tmp_path / "step1_sft" / "logs"
    assert "a_judge_that_never_answers" in (logs / "rank0.log").read_text()
    (record,) = read_records(logs)
    assert record.phase == "evaluate"
    assert "no progress for 3 s" in record.message
    (tmp_path / "log").write_text(shown)
    said = str(explain(SFT, Outcome(1, 0, 1.0, tmp_path / "log", 0), logs))
    assert "no progress for 3 s (launch.stall_timeout)" in said
    assert "a file system that does not answer" in said


@pytest.mark.parametrize(("limit", "marks", "then"), [(4.0, 30, "pass"), (0.0, 1, "time.sleep(3)")])
def test_who_gets_somewhere_goes_on(tmp_path: Path, limit: float, marks: int, then: str) -> None:
    rank = start(tmp_path, limit, marks, then)
    shown, _ = rank.communicate(timeout=120)
    assert rank.returncode == 0, shown


def test_a_process_that_was_stopped_has_not_stalled(tmp_path: Path) -> None:
    """SIGSTOP and SIGCONT, a suspended laptop: the time away is not its own."""
    rank = start(tmp_path, 14.0, 30, "pass")
    log = tmp_path / "step1_sft" / "logs" / "rank0.log"
    while not (log.exists() and "evaluate" in log.read_text()):
        time.sleep(0.1)
    os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(16)
    os.kill(rank.pid, signal.SIGCONT)
    shown, _ = rank.communicate(timeout=120)
    assert rank.returncode == 0, shown


def test_ranks_that_lost_a_stopped_driver_say_so(tmp_path: Path) -> None:
    """The driver that goes on afterwards tells the cause, not that a rank was killed."""
    code = f"""
        import pathlib, sys, time
        sys.path.insert(0, {str(PROJECT_ROOT)!r})
        from rlhf.lifeline import Lifeline
        Lifeline(pathlib.Path("."), 1, {{"RLHF_HEARTBEAT": "2"}}).start()
        time.sleep(600)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, timeout=120)
    assert done.returncode == 143
    content = json.loads((tmp_path / "rank1.failure.json").read_text())
    assert "no sign of life of the driver for 2 s" in content["message"]
    (tmp_path / "log").touch()
    outcome = Outcome(143, 0, 1.0, tmp_path / "log", 0, spread=True)
    said = str(explain(SFT, outcome, tmp_path, absent=["rank 1"]))
    assert "the driver was stopped (Ctrl-Z, SIGSTOP)" in said
    assert "dmesg" not in said
    assert "killed?" not in said
