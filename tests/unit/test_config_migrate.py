"""Records of older releases: a setting that they lack has its default, removed ones are ignored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launch.gate import finished_step
from launch.options import parse_options
from rlhf.config import migrate
from rlhf.config.load import load_config
from rlhf.config.migrate import SCHEMA_VERSION, changes, migrated
from rlhf.config.resolve import decisive, resolve_step
from rlhf.config.step_args import step_config
from rlhf.config.trees import flatten
from rlhf.stages import REWARD
from rlhf.store import RunDir, jsonable, verify
from rlhf.store.checkpoints import differences, verify_checkpoint
from tests.unit.driver_help import make_artifact

RELEASES = sorted((Path(__file__).parents[1] / "fixtures").glob("release_*"))


def test_a_missing_setting_has_its_default() -> None:
    now = {"seed": 1, "step3.ppo.gamma": 1.0, "step3.ppo.clip": 0.2}
    assert changes({"seed": 1}, now, 0) == []
    assert changes({"seed": 1}, {**now, "step3.ppo.clip": 0.3}, 0) == ["step3.ppo.clip 0.2 -> 0.3"]


def test_values_that_went_through_json_are_the_same() -> None:
    """A tuple is a list there; the default 10_000 is 10000.0 once it was checked."""
    assert changes({"data.split": [2, 4, 4]}, {"data.split": (2.0, 4.0, 4.0)}, 0) == []
    assert changes({}, {"step3.ppo.kl_horizon": 10000.0}, 0) == []


def test_a_setting_that_decides_nothing_any_more_is_not_compared() -> None:
    assert changes({"step1.train.log_every": 5, "seed": 1}, {"seed": 1}, 0) == []


def test_an_entry_of_a_mapping_that_goes_is_a_change() -> None:
    (told,) = changes({"data.columns.prompt": "x"}, {"data.columns": {}}, 0)
    assert told == "data.columns.prompt 'x' -> None"


def test_removed_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the default that they had they are ignored, in records and recipes; else named."""
    monkeypatch.setitem(migrate.REMOVED, "step1.old_way", False)
    assert changes({"step1.old_way": False}, {}, 0) == []
    (told,) = changes({"step1.old_way": True}, {}, 0)
    assert told == "step1.old_way True -> no longer a setting"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("seed: 7\nstep1: {old_way: false}\n")
    assert load_config(recipe).seed == 7


def test_migrations_run_from_the_records_version_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(flat: dict) -> dict:
        return {("seed" if name == "random_seed" else name): flat[name] for name in flat}

    monkeypatch.setitem(migrate.MIGRATIONS, 0, renamed)
    assert migrated({"random_seed": 3}, 0) == {"seed": 3}
    assert migrated({"random_seed": 3}, SCHEMA_VERSION) == {"random_seed": 3}


def test_there_is_a_fixture_of_every_release() -> None:
    assert RELEASES


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_what_an_older_release_wrote_opens(release: Path, tmp_path: Path) -> None:
    """Artifact, checkpoint, resolved.json and recipe; and nothing of it counts as changed."""
    run = RunDir(release / "run")
    config = load_config(release / "recipe.yaml")
    manifest = verify(run.artifact("sft"), "sft")
    now = flatten(jsonable(config))
    written = flatten(manifest.config)
    told = changes(
        {k: v for k, v in written.items() if k.startswith("step1")},
        {k: v for k, v in now.items() if k.startswith("step1")},
        manifest.schema_version,
    )
    assert told == []
    record = verify_checkpoint(next(run.resume(2).glob("step-*")))
    resolved = resolve_step(
        config, 2, run_dir=run.path, parents=json.loads(run.resolved(2).read_text())["parents"],
        parent_configs={"sft": manifest.config},
    )  # fmt: skip
    fatal, changed = differences(
        record,
        settings=decisive(jsonable(resolved.config), REWARD),
        parents=record.parents,
    )
    assert (fatal, changed) == ([], [])
    told_step = step_config(["--config", str(run.resolved(2))], 2)
    assert told_step.config.step2 == resolved.config.step2


def test_a_finished_step_without_a_new_setting_is_done(tmp_path: Path) -> None:
    """Issue 11: "again: settings changed ... None -> 0.0" after a release with a new setting."""
    argv = ["--output-dir", str(tmp_path), "--name", "r", "--step", "1"]
    options = parse_options(argv, {})
    resolved = resolve_step(options.config, 1, run_dir=options.run.path)
    config = jsonable(resolved.config)
    del config["step1"]["prompt_loss"]
    del config["data"]["long_prompts"]
    make_artifact(options.run.path, 1, config)
    manifest, why = finished_step(options, resolved, [])
    assert manifest is not None
    assert why == ""
    shutil.rmtree(options.run.path)
    config["step1"]["prompt_loss"] = True
    make_artifact(options.run.path, 1, config)
    assert finished_step(options, resolved, [])[1] == (
        "settings changed: step1.prompt_loss True -> False"
    )
