"""No link inside a run directory is followed for writing (issue 11)."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.execute import locked
from launch.spec import LaunchSpec
from launch.supervise import supervise
from rlhf.config.schema import ResolvedStep
from rlhf.errors import RequirementError
from rlhf.harness import StepRun, only_one
from rlhf.ranklog import RankLog
from rlhf.store import RunDir, write_text_atomic
from rlhf.track.metrics import MetricsFile


def _lock(place: Path) -> None:
    with locked(place.parent):
        pass


def _running(place: Path) -> None:
    run = StepRun(ResolvedStep(step=1, run_dir=str(place.parent.parent)), 0)
    with only_one(run):
        pass


def _console_log(place: Path) -> None:
    supervise(LaunchSpec(["true"], {}, str(place.parent), []), place)


def _rank_log(place: Path) -> None:
    RankLog(place, None)  # type: ignore[arg-type]  # nobody is told anything


def _metrics(place: Path) -> None:
    MetricsFile(place.parent).write({"loss": 1.0}, 1)


STEP = RunDir("run").step_dir(1).name


@pytest.mark.parametrize(
    ("name", "write"),
    [
        (".lock", _lock),
        (f"{STEP}/.running", _running),
        ("logs/console.log", _console_log),
        ("logs/rank0.log", _rank_log),
        ("metrics.jsonl", _metrics),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_refused_and_its_target_unchanged(
    tmp_path: Path, name: str, write, exists: bool
) -> None:
    target = tmp_path / "precious"
    if exists:
        target.write_text("mine\n")
    place = tmp_path / "run" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)
    with pytest.raises((RequirementError, OSError)) as caught:
        write(place)
    assert "symbolic link" in str(caught.value)
    assert target.exists() == exists
    assert not exists or target.read_text() == "mine\n"


def test_a_file_that_is_renamed_into_place_replaces_the_link(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine\n")
    (tmp_path / "verdict.txt").symlink_to(target)
    write_text_atomic(tmp_path / "verdict.txt", "ours\n")
    assert target.read_text() == "mine\n"
    assert not (tmp_path / "verdict.txt").is_symlink()
