"""What the driver does when a step fails, with fake steps: resume, restart, roll back, shrink."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.store import RunDir, checkpoints
from tests.unit.driver_help import make_checkpoint, read
from tests.unit.test_driver_run import driver

__all__ = ["driver"]  # a fixture


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "output" / "tiny_cpu")


def attempts(run: RunDir, step: int) -> list[dict[str, Any]]:
    lines = (run.path / "attempts.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["step"] == step]


def test_without_restarts_a_failure_is_the_end(driver, run: RunDir) -> None:
    code, _, err = driver(fake="fail", step=1)
    assert code == 1
    assert "it broke" in err
    assert len(attempts(run, 1)) == 1


def test_max_restarts(driver, run: RunDir) -> None:
    """Twice more, and it says so each time; the third failure would have been the last."""
    code, out, _ = driver("--max-restarts", "2", fake="fail,fail,ok", step=2)
    assert code == 0
    assert "--max-restarts leaves 1 more; from its beginning (nothing was saved)" in out
    assert "--max-restarts leaves 0 more" in out
    assert len(attempts(run, 2)) == 3


def test_restarts_run_out(driver, run: RunDir) -> None:
    code, _, err = driver("--max-restarts", "1", fake="fail", step=2)
    assert code == 1
    assert "it broke" in err
    assert len(attempts(run, 2)) == 2


def test_a_users_error_is_not_tried_again(driver, run: RunDir) -> None:
    code, _, _ = driver("--max-restarts", "3", fake="requirement", step=1)
    assert code == 3
    assert len(attempts(run, 1)) == 1


def test_a_restart_goes_on_from_what_was_saved(driver, run: RunDir) -> None:
    code, out, _ = driver("--max-restarts", "1", fake="save_and_fail,ok", step=1)
    assert code == 0
    assert "from checkpoint step-00000007" in out


def test_a_failure_names_what_is_saved(driver, run: RunDir) -> None:
    code, _, err = driver(fake="save_and_fail", step=1)
    assert code == 1
    assert f"Saved: {run.resume(1) / 'step-00000007'}; the same command goes on from there" in err
    code, out, _ = driver("--dry-run")
    assert code == 0
    assert "goes on from step-00000007 (saved 20" in out
    code, out, _ = driver("--dry-run", "--json")
    assert json.loads(out)["steps"][0]["goes_on_from"].startswith("step-00000007")


def test_a_divergence_rolls_back_once(driver, run: RunDir) -> None:
    """Half the learning rates; the second time it stops, with the evidence."""
    code, out, _ = driver(fake="diverge,ok", step=2)
    assert code == 0
    assert "step 2: it diverged; going back, once, with learning rates times 0.5" in out
    assert [row["learning_rate_scale"] for row in attempts(run, 2)] == [1.0, 0.5]
    assert not (run.resume(2) / "recovery.json").exists() or read(run.resume(2) / "recovery.json")


def test_a_second_divergence_is_the_end(driver, run: RunDir) -> None:
    code, _, err = driver("--max-restarts", "5", fake="diverge", step=2)
    assert code == 1
    assert "has diverged again after going back to a checkpoint" in err
    assert "learning rates times 0.5" in err
    assert len(attempts(run, 2)) == 2
    why = read(run.resume(2) / "recovery.json")
    assert why["learning_rate_scale"] == 0.5
    assert "the training loss is nan" in why["why"]
    # The next command knows that it was rolled back already; --resume never forgets it.
    assert driver(fake="diverge", step=2)[0] == 1
    assert attempts(run, 2)[-1]["learning_rate_scale"] == 0.5
    assert len(attempts(run, 2)) == 3
    assert driver("--resume", "never", step=2)[0] == 0
    assert attempts(run, 2)[-1]["learning_rate_scale"] == 1.0


def test_auto_batch_halves_the_micro_batch(driver, run: RunDir) -> None:
    """The optimiser's batch stays; without the flag it is a failure with its remedy."""
    code, _, err = driver(fake="memory", step=1)
    assert code == 1
    assert "micro_batch_size" in err
    code, out, _ = driver("--auto-batch", fake="memory,memory,memory,ok", step=1)
    assert code == 0
    assert "--auto-batch sets step1.train.micro_batch_size 16 -> 8 (the batch stays)" in out
    sizes = [row["config"]["step1"]["train"]["micro_batch_size"] for row in attempts(run, 1)]
    assert sizes == [16, 16, 8, 4]
    assert {row["config"]["step1"]["train"]["batch_size"] for row in attempts(run, 1)} == {16}


def test_auto_batch_ends_at_one(driver, run: RunDir) -> None:
    code, _, err = driver("--auto-batch", "step1.train.micro_batch_size=2", fake="memory", step=1)
    assert code == 1
    assert "--auto-batch: step1.train.micro_batch_size is 1 already" in err
    assert len(attempts(run, 1)) == 2


def test_resume_never_removes_checkpoints_once(driver, run: RunDir) -> None:
    """What is saved after that start serves its own restarts."""
    assert driver(fake="save_and_fail", step=1)[0] == 1
    code, _, _ = driver("--resume", "never", "--max-restarts", "1", fake="fail", step=1)
    assert code == 1
    assert checkpoints.checkpoints(run.resume(1)) == []
    assert attempts(run, 1)[-1]["config"]["checkpoint"]["resume"] == "auto"


def test_force_starts_again(driver, run: RunDir) -> None:
    assert driver(fake="save_and_fail", step=1)[0] == 1
    code, out, _ = driver("--force", step=1)
    assert code == 0
    assert "goes on from" not in out


def test_a_checkpoint_with_other_settings_is_refused_before_anything_starts(
    driver, run: RunDir
) -> None:
    assert driver(fake="save_and_fail", step=1)[0] == 1
    code, _, err = driver("step1.optim.learning_rate=0.5")
    assert code == 2
    assert "step1.optim.learning_rate 0.003 -> 0.5" in err
    assert "--resume always" in err
    assert "--resume never" in err
    assert len(attempts(run, 1)) == 1
    assert driver("step1.optim.learning_rate=0.5", "--resume", "always")[0] == 0


def test_a_checkpoint_of_an_older_parent_is_refused(driver, run: RunDir) -> None:
    """Step 1 is made again: what step 2 had done was done from another model."""
    assert driver(fake="save_and_fail", step=2)[0] == 1
    code, _, err = driver("step1.optim.learning_rate=0.5")
    assert code == 2
    assert "step 1 runs again first" in err


def test_more_processes_and_another_stage_go_on(driver, run: RunDir) -> None:
    assert driver(fake="save_and_fail", step=1)[0] == 1
    flags = ("--deployment-type", "single_node", "--num-gpus", "2", "--actor-zero-stage", "3")
    _, out, _ = driver(*flags, "--dry-run")
    assert "goes on from step-" in out
    assert ", by 1 process: 2 now)" in out


def test_a_damaged_recovery_record_is_named(driver, run: RunDir) -> None:
    assert driver(fake="diverge", step=1)[0] == 1
    (run.resume(1) / "recovery.json").write_text('{"x": 1}')
    code, _, err = driver()
    assert code == 3
    assert "recovery.json: damaged" in err


def test_the_fake_checkpoint_is_a_checkpoint(driver, run: RunDir) -> None:
    assert driver(fake="save_and_fail", step=1)[0] == 1
    place = make_checkpoint(run.path, 1, read(run.resolved(1)), position=9)
    assert checkpoints.verify_checkpoint(place).position == 9


def test_auto_batch_halves_what_a_rank_reads_at_once(driver, run: RunDir) -> None:
    """A micro-batch over a rank's share is its share: 64 of 16 rows would fail twice more."""
    flags = ("--auto-batch", "step1.train.micro_batch_size=64", "step1.train.batch_size=16")
    code, out, _ = driver(*flags, fake="memory,ok", step=1)
    assert code == 0
    assert "step1.train.micro_batch_size 16 -> 8" in out


@pytest.mark.parametrize("after", ["no_marker", "record_after"])
def test_what_is_published_is_not_made_again(driver, run: RunDir, after: str) -> None:
    """A rank fails after publishing: --max-restarts leaves a step alone that the same command
    would find done. Without restarts it is a failure, as before."""
    code, out, _ = driver("--max-restarts", "1", fake=f"{after},ok", step=1)
    assert code == 0, out
    assert "its artifact had been published and verifies" in out
    assert len(attempts(run, 1)) == 1
    assert driver("--force", fake=after, step=1)[0] == 1
    assert "already done" in driver("--dry-run")[1]
