"""Trackers by name, through accelerate's classes and without its state."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema import RunConfig, TrackConfig
from rlhf.errors import ConfigError, RequirementError
from rlhf.track import TRACKERS, TrackerWarning, open_tracker, read_metrics, tracker_names
from rlhf.track.forward import Place, flatten

ROOT = Path(__file__).parents[2]
CONFIG = {"seed": 1, "step1": {"optim": {"learning_rate": 1e-5, "betas": [0.9, 0.95]}, "x": None}}


def test_auto_writes_event_files_that_tensorboard_reads(tmp_path: Path) -> None:
    """C16: TensorBoard; values, steps and the configuration come back."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_tracker(TrackConfig(), tmp_path, step=1, rank=0, config=CONFIG) as tracker:
        tracker.log({"loss": 0.5, "kl": float("nan")}, step=10)
        tracker.log({"loss": 0.25, "tokens": 7}, step=20)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    assert loss == [(10, 0.5), (20, 0.25)]
    assert [event.value for event in events.Scalars("tokens")] == [7.0]
    (settings,) = (tmp_path / "tensorboard").glob("*/hparams.yml")
    assert "step1.optim.learning_rate: 1.0e-05" in settings.read_text()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20]


def test_a_whole_run_configuration_fits(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    config = RunConfig().model_dump(mode="json")
    open_tracker(TrackConfig(), tmp_path, step=1, rank=0, config=config).close()
    assert [w for w in recwarn if issubclass(w.category, TrackerWarning)] == []
    assert flatten(CONFIG) == {
        "seed": 1,
        "step1.optim.learning_rate": 1e-5,
        "step1.optim.betas": "[0.9, 0.95]",
        "step1.x": "None",
    }


def test_aim_repository_is_opened_by_aim(tmp_path: Path) -> None:
    """C16: aim, read back with aim's own reader."""
    aim = pytest.importorskip("aim", reason="aim is not installed: pip install aim")
    step_dir = tmp_path / "run" / "step1_sft"
    track = TrackConfig(trackers=["aim"], project="p")
    with open_tracker(track, step_dir, step=1, rank=0, config=CONFIG) as tracker:
        tracker.log({"loss": 0.5}, step=10)
    repository = str(tmp_path / "run")
    index = "from aim.cli.cli import cli_entry_point; cli_entry_point()"  # as `aim up` does
    subprocess.run(
        [sys.executable, "-c", index, "storage", "--repo", repository, "reindex", "-y"],
        check=True,
        capture_output=True,
    )
    (run,) = aim.Repo(repository).iter_runs()
    (metric,) = [m for m in run.metrics() if m.name == "loss"]
    assert [(step, values[0]) for step, values in metric.data.items()] == [(10, 0.5)]
    assert run.name == "run-step1"
    assert run["hparams", "seed"] == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_unknown_names_are_refused_on_every_rank(tmp_path: Path, rank: int) -> None:
    track = TrackConfig(trackers=["tensorbord"])
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'") as caught:
        open_tracker(track, tmp_path / "step", step=1, rank=rank, config={})
    assert all(name in str(caught.value) for name in TRACKERS)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.track.forward._installed", lambda module: False)
    track = TrackConfig(trackers=["aim", "wandb"])
    with pytest.raises(RequirementError, match="pip install aim wandb"):
        open_tracker(track, tmp_path / "step", step=1, rank=0, config={})
    assert list(tmp_path.iterdir()) == []
    assert tracker_names(TrackConfig()) == []  # auto without tensorboard


def test_accelerate_knows_every_tracker(tmp_path: Path) -> None:
    """Each entry of the table fits the constructor of accelerate's class of that name."""
    classes = importlib.import_module("accelerate.tracking").LOGGER_TYPE_TO_CLASS
    for name, kind in TRACKERS.items():
        inspect.signature(classes[name]).bind(**kind.arguments(Place(tmp_path, 1, "project")))


@pytest.mark.parametrize(
    ("name", "naming"),
    [("wandb", "name"), ("trackio", "name"), ("swanlab", "experiment_name")],
)
def test_services_get_project_run_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, naming: str
) -> None:
    """C16: wandb, trackio (and swanlab) by name; the service's package is a stand-in."""
    calls: dict[str, Any] = {"log": []}
    run = types.SimpleNamespace(
        log=lambda values, step, **_: calls["log"].append((step, values)),
        finish=lambda: calls.update(finished=True),
    )

    class Config(dict):
        def update(self, values: Any, **_: Any) -> None:  # type: ignore[override]
            calls["config"] = values

    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.init = lambda **arguments: calls.update(init=arguments) or run
    module.config = Config()
    module.finish = run.finish
    monkeypatch.setitem(sys.modules, name, module)
    track = TrackConfig(trackers=[name, name], project="mine")
    with open_tracker(
        track, tmp_path / "run" / "step2_reward", step=2, rank=0, config=CONFIG
    ) as tracker:
        tracker.log({"loss": 0.5}, step=3)
    assert calls["init"]["project"] == "mine"
    assert calls["init"][naming] == "run-step2"
    assert calls["config"]["seed"] == 1
    assert calls["log"] == [(3, {"loss": 0.5})]
    assert calls["finished"]


def failing_tracker(monkeypatch: pytest.MonkeyPatch, fails: set[str]) -> list[str]:
    from accelerate import tracking

    seen: list[str] = []

    class Failing:
        main_process_only = True

        def __init__(self, **_: Any) -> None:
            self._do("init")

        def start(self) -> None:
            self._do("start")

        def store_init_configuration(self, values: dict) -> None:
            self._do("config")

        def log(self, values: dict, step: int) -> None:
            self._do(f"log{step}")

        def finish(self) -> None:
            self._do("finish")

        def _do(self, what: str) -> None:
            seen.append(what)
            if what in fails:
                raise RuntimeError(f"{what} is down")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Failing)  # type: ignore
    return seen


ALL_CALLS = ["init", "start", "config", *(f"log{step}" for step in range(1, 7)), "finish"]


@pytest.mark.parametrize(
    ("fails", "seen"),
    [
        ({"init"}, ["init"]),
        ({"start"}, ["init", "start"]),
        ({"config"}, ALL_CALLS),
        ({"log2"}, ALL_CALLS),
        ({"log1", "log2", "log4", "log5"}, ALL_CALLS),  # never three in a row
        ({"log1", "log2", "log3"}, ["init", "start", "config", "log1", "log2", "log3", "finish"]),
        ({"finish"}, ALL_CALLS),
    ],
)
def test_a_failing_tracker_warns_once_and_training_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    fails: set[str],
    seen: list[str],
) -> None:
    """STYLE 15; after three failures in a row the tracker is left alone."""
    pytest.importorskip("tensorboard")
    calls = failing_tracker(monkeypatch, fails)
    with open_tracker(TrackConfig(), tmp_path, step=1, rank=0, config={}) as tracker:
        for step in range(1, 7):
            tracker.log({"loss": 1.0}, step)
    assert calls == seen
    warned = [w for w in recwarn if issubclass(w.category, TrackerWarning)]
    assert len(warned) == 1
    assert "is down" in str(warned[0].message)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6


RANK = """
import os, sys, torch, torch.distributed as dist
from accelerate.state import PartialState
from rlhf.config.schema import TrackConfig
from rlhf.track import open_tracker

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=rank, world_size=2)
group, threads = dist.group.WORLD, torch.get_num_threads()
with open_tracker(TrackConfig(), f"{sys.argv[1]}/step", step=1, rank=rank, config={}) as tracker:
    total = torch.ones(1)
    dist.all_reduce(total)
    tracker.log({"total": total}, step=1)
assert dist.group.WORLD is group and torch.get_num_threads() == threads
assert PartialState._shared_state == {}, "accelerate made its own state"
dist.barrier()
"""


def test_beside_a_process_group_that_exists(tmp_path: Path) -> None:
    """Under launch variables and a live group accelerate starts none and changes nothing."""
    pytest.importorskip("tensorboard")
    common = {**os.environ, "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "error::rlhf.track.TrackerWarning", "-c", RANK, str(tmp_path)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert "failed" not in outputs[0]
    assert [row["total"] for row in read_metrics(tmp_path / "step/metrics.jsonl")] == [2.0]
    assert list((tmp_path / "step/tensorboard").glob("events.*"))
