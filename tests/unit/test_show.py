"""`rlhf show`: where a run stands, whatever became of it, and its curves."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import runs, show
from launch.curves import BLOCKS, curves, sparkline, thinned
from launch.execute import locked
from rlhf.store import RunDir
from tests.unit.test_driver_run import DRIVE, driver
from tests.unit.test_launch_supervise import wait_for

__all__ = ["driver"]  # a fixture


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "output" / "tiny_cpu")


def log(run: RunDir, step: int, *rows: dict) -> None:
    lines = [{"step": i, "time": 1e9 + i, "seconds": i, **row} for i, row in enumerate(rows, 1)]
    run.metrics(step).write_text("".join(json.dumps(line) + "\n" for line in lines))


def shown(driver, *argv: str) -> dict:
    code, out, err = driver("show", *argv, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def states_of(found: dict) -> list[str]:
    return [step["state"] for step in found["steps"]]


def test_sparkline_by_hand() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BLOCKS
    assert sparkline([3, 3, 3], 8) == BLOCKS[3] * 3, "what does not change is in the middle"
    assert sparkline([0, 2, 6, 8], 2) == BLOCKS[0] + BLOCKS[7], "means of two: 1 and 7"
    assert sparkline([0, 0, math.nan, 7, 7], 5) == BLOCKS[0] * 2 + "?" + BLOCKS[7] * 2
    assert sparkline([math.inf], 5) == "?"
    assert sparkline([], 5) == ""
    assert sparkline([1, 0], 2, "ab") == "ba"


def test_a_step_that_was_logged_again_counts_once() -> None:
    rows = [
        {"step": 1, "time": 0.0, "seconds": 0.0, "loss": 5.0},
        {"step": 2, "time": 0.0, "seconds": 0.0, "loss": 4.0, "name": "text"},
        {"step": 2, "time": 0.0, "seconds": 0.0, "loss": 3.0},
        {"step": 2, "time": 0.0, "seconds": 0.0, "other": 1},
    ]
    assert curves(rows) == {"loss": [(1, 5.0), (2, 3.0)], "other": [(2, 1.0)]}


def test_thinned_keeps_the_ends() -> None:
    long = [(i, float(i)) for i in range(10_001)]
    kept = thinned(long, 500)
    assert len(kept) == 500
    assert (kept[0], kept[-1]) == (long[0], long[-1])
    assert thinned(long[:500], 500) == long[:500]


def test_a_finished_run(driver, run: RunDir) -> None:
    assert driver()[0] == 0
    log(
        run, 3,
        {"score_normalised": -1.0, "seconds_rollout": 1.0, "seconds_update": 3.0,
         "seconds_iteration": 4.5, "peak_memory_bytes_rollout": 2e9, "peak_memory_bytes": 2e9},
        {"score_normalised": 1.0, "seconds_rollout": 1.0, "seconds_update": 3.0,
         "seconds_iteration": 5.5, "peak_memory_bytes_rollout": 1e9, "peak_memory_bytes": 3e9},
    )  # fmt: skip
    found = shown(driver, "tiny_cpu")
    assert states_of(found) == ["finished"] * 3
    last = found["steps"][2]
    assert last["iteration_seconds_by_phase"] == {"rollout": 2.0, "update": 6.0}
    assert last["seconds_an_iteration"] == 5.0
    assert last["peak_bytes"] == 3e9
    assert last["peak_bytes_by_phase"] == {"rollout": 2e9}
    curve = last["curves"]["score_normalised"]
    assert (curve["first"], curve["last"], curve["lowest"], curve["points"]) == (-1.0, 1.0, -1.0, 2)
    code, out, _ = driver("show", str(run.path))
    assert code == 0
    assert "step 3   PPO: finished, artifact " in out
    assert f"{BLOCKS[0]}{BLOCKS[7]}" in out
    assert "-1 -> 1" in out
    assert "iterations  rollout 25%, update 75%, 5.00 s each" in out
    assert "memory  3.00 GB at most, a process (rollout 2.00 GB)" in out
    assert "asked    python train.py" in out
    assert "next     rlhf chat tiny_cpu" in out
    code, out, _ = driver("show")
    assert out == f"{'tiny_cpu':24} SFT finished, reward model finished, PPO finished\n"


def test_a_run_that_failed(driver, run: RunDir) -> None:
    """With what the rank wrote, escaped, and the command that goes on."""
    assert driver("launch.threads=1", fake="requirement", step=2)[0] == 3
    found = shown(driver, "tiny_cpu")
    assert states_of(found) == ["finished", "died", "not started"]
    assert found["steps"][1]["why"].startswith("rank 0 in train: DataError: rows.jsonl: no rows")
    record = run.logs(2) / "rank0.failure.json"
    record.write_text(record.read_text().replace("no rows", "\\u001b[2J"))
    code, out, _ = driver("show", "tiny_cpu")
    assert code == 0
    assert "step 2   reward model: died: rank 0 in train: DataError: rows.jsonl: \\x1b[2J" in out
    assert "verdict  none: step 3 has published nothing" in out
    assert out.rstrip().endswith("next     goes on with: python train.py launch.threads=1")


def test_a_run_that_failed_with_a_checkpoint_is_saved(driver, run: RunDir) -> None:
    assert driver(fake="save_and_fail", step=3)[0] == 1
    found = shown(driver, "tiny_cpu")
    assert states_of(found) == ["finished", "finished", "died"]
    assert found["steps"][2]["saved"] == "step-00000007"
    assert "saved at step-00000007" in driver("show", "tiny_cpu")[1]


def test_a_run_that_goes_on_and_one_that_was_stopped_or_killed(
    driver, run: RunDir, tmp_path: Path
) -> None:
    """A real driver, seen from another process while it works, then after SIGTERM, then after
    SIGKILL of a second start."""
    import os

    from launch.spec import PROJECT_ROOT

    script = tmp_path / "drive.py"
    script.write_text(DRIVE.format(root=str(PROJECT_ROOT), steps=str(tmp_path / "steps")))

    def start() -> subprocess.Popen[bytes]:
        (run.path / "asleep").unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env={**os.environ, "FAKE": "sleep", "FAKE_STEP": "2"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert wait_for((run.path / "asleep").exists, 240)
        return process

    process = start()
    log(run, 2, {"train/loss": 1.0})
    assert states_of(shown(driver, "tiny_cpu")) == ["finished", "going on", "not started"]
    out = driver("show", "tiny_cpu")[1]
    assert "step 2   reward model: going on, logged up to 1, " in out
    assert "next     it is going on" in out
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 143
    found = shown(driver, "tiny_cpu")
    assert states_of(found) == ["finished", "stopped", "not started"]
    assert "had saved nothing" in found["steps"][1]["why"]

    process = start()
    process.kill()
    process.wait(240)
    assert wait_for(lambda: not runs.working(run), 240)
    found = shown(driver, "tiny_cpu")
    assert states_of(found) == ["finished", "died", "not started"], "not the earlier start's end"
    assert found["steps"][1]["why"] == "without a word (killed?)"


def test_a_step_that_is_made_again(driver, run: RunDir) -> None:
    """The artifact of an earlier start does not make the later one finished."""
    assert driver()[0] == 0
    import time

    time.sleep(1.1)  # the records have whole seconds
    assert driver("--force", fake="fail", step=1)[0] == 1
    found = shown(driver, "tiny_cpu")
    assert states_of(found)[0] == "died"
    assert "the artifact of an earlier start is there" in found["steps"][0]["why"]


def test_time_that_is_left(driver, run: RunDir) -> None:
    """By hand: 12 of the recipe's 60 iterations at 2 s each: 96 s."""
    assert driver("--step", "1", "2")[0] == 0
    assert driver(fake="fail", step=3)[0] == 1
    log(run, 3, *[{"seconds_iteration": 2.0, "seconds_rollout": 1.0}] * 12)
    with locked(run.path):
        found = show.report(run)
        assert states_of(found) == ["finished", "finished", "going on"]
        assert (found["steps"][2]["position"], found["steps"][2]["iterations"]) == (12, 60)
        assert "about 1 min 36 s left" in "\n".join(show.describe(found, BLOCKS))


def test_figures_that_cannot_be_read_and_numbers_that_are_none(driver, run: RunDir) -> None:
    assert driver("--step", "1", "2")[0] == 0
    run.metrics(1).write_text('{"step": 1, "time": 1, "seconds": 1, "train/loss": "NaN"}\n')
    run.metrics(2).write_text("no json\n")
    code, out, _ = driver("show", "tiny_cpu")
    assert code == 0
    assert "loss  ?                         nan" in out
    assert "metrics.jsonl:1: not a line of metrics" in out
    found = shown(driver, "tiny_cpu")
    assert found["steps"][0]["curves"]["train/loss"]["last"] == "NaN", "valid JSON"


def test_every_curve_and_a_console_without_blocks(driver, run: RunDir, monkeypatch) -> None:
    assert driver("--step", "1")[0] == 0
    log(run, 1, {"train/odd": 1.0}, {"train/odd": 2.0})
    assert "train/odd" not in driver("show", "tiny_cpu")[1]
    monkeypatch.setattr(show, "_shows", lambda text: False)
    out = driver("show", "tiny_cpu", "--all")[1]
    assert "train/odd  _#" in out


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["nowhere"], 3, "show nowhere: no such run"),
        (["."], 3, "this directory holds no run. Runs in output/: tiny_cpu."),
        (["tiny_cpu", "--jsn"], 2, "Did you mean --json?"),
    ],
)
def test_what_cannot_be_shown(driver, argv: list[str], code: int, said: str) -> None:
    assert driver("--step", "1")[0] == 0
    found, _, err = driver("show", *argv)
    assert found == code
    assert said in err


def test_the_verdict_over_seeds_is_shown(driver, tmp_path: Path) -> None:
    place = tmp_path / "output" / "many-seeds"
    place.mkdir(parents=True)
    (place / "verdict.txt").write_text("VERDICT over 2 seeds\n")
    (place / "verdict.json").write_text('{"outcome": "learned"}\n')
    assert driver("show", "many-seeds")[1] == "VERDICT over 2 seeds\n"
    assert shown(driver, "many-seeds") == {"outcome": "learned"}


def test_no_torch_is_loaded() -> None:
    code = "import sys, launch.show, launch.chat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
