"""`--from RUN`: another run's settings and models are where a new run starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch.options import parse_options
from rlhf.store import RunDir, read_manifest
from tests.unit.driver_help import make_artifact, read
from tests.unit.test_driver_run import driver

__all__ = ["driver"]  # a fixture

KL = ["--from", "tiny_cpu", "--step", "3", "step3.ppo.kl_coef=0.02", "--name", "kl02"]


OWN = ["step3.ppo.gamma=0.9", "step1.optim.learning_rate=0.5", "--seed", "7"]


@pytest.fixture
def first(driver, tmp_path: Path) -> RunDir:
    """What the driver would leave of a finished run with settings of its own."""
    run = RunDir(tmp_path / "output" / "tiny_cpu")
    config = parse_options(OWN, environ={}).config
    parents: dict[str, str] = {}
    for step, role in ((1, "sft"), (2, "reward"), (3, "ppo")):
        make_artifact(run.path, step, config, parents)
        parents[role] = str(run.artifact(role))
    return run


def config_of(run: RunDir, step: int) -> dict:
    return read_manifest(run.step_dir(step) / "artifact").config


def test_the_issues_example(driver, tmp_path: Path) -> None:
    """Only PPO runs; its settings are those of the first run but for the one that is given; its
    parents are the first run's artifacts, by id."""
    assert driver(*OWN)[0] == 0
    first = RunDir(tmp_path / "output" / "tiny_cpu")
    code, out, err = driver(*KL)
    assert (code, err) == (0, "")
    run = RunDir(tmp_path / "output" / "kl02")
    assert "this is step 3" in out
    assert "this is step 1" not in out
    assert f"recipe   the settings of {first.path} (--from)" in out
    assert f"--from: {first.artifact('sft')} serves as the SFT model" in out
    before, now = config_of(first, 3), config_of(run, 3)
    assert now["step3"]["ppo"].pop("kl_coef") == 0.02
    before["step3"]["ppo"].pop("kl_coef")
    before["step3"]["actor"]["model"].pop("name")  # inherited: the parent's place, the same
    now["step3"]["actor"]["model"].pop("name")
    assert now["step3"] == before["step3"]
    assert now["step3"]["ppo"]["gamma"] == 0.9
    assert (now["seed"], now["data"]) == (7, before["data"])
    parents = read_manifest(run.artifact("ppo")).parents
    assert {name: (one.path, one.id) for name, one in parents.items()} == {
        name: (str(first.artifact(name)), read_manifest(first.artifact(name)).id)
        for name in ("sft", "reward")
    }
    assert read(run.pipeline)["from"] == str(first.path)
    code, out, err = driver(*KL)
    assert (code, err) == (0, "")
    assert "already done" in out, "the same command again"
    assert driver(*[word.replace("0.02", "0.03") for word in KL])[0] == 2, "nothing is replaced"


def test_train_is_a_verb(driver, first: RunDir, tmp_path: Path) -> None:
    assert driver("train", *KL)[0] == 0
    assert RunDir(tmp_path / "output" / "kl02").artifact("ppo").is_dir()


def test_a_new_reward_model_too(driver, first: RunDir, tmp_path: Path) -> None:
    argv = ["--from", str(first.path), "--step", "2", "3", "step2.train.epochs=3", "--name", "rm"]
    code, _, err = driver(*argv)
    assert (code, err) == (0, "")
    run = RunDir(tmp_path / "output" / "rm")
    assert config_of(run, 2)["step2"]["train"]["epochs"] == 3
    parents = read_manifest(run.artifact("ppo")).parents
    assert parents["sft"].path == str(first.artifact("sft"))
    assert parents["reward"].path == str(run.artifact("reward"))


def test_all_steps_anew_take_the_recipe_alone(driver, first: RunDir, tmp_path: Path) -> None:
    argv = ["--from", "tiny_cpu", "--step", "1", "2", "3", "--seed", "8", "--name", "again"]
    code, _, err = driver(*argv)
    assert (code, err) == (0, "")
    run = RunDir(tmp_path / "output" / "again")
    assert config_of(run, 1)["step1"]["optim"]["learning_rate"] == 0.5
    assert config_of(run, 1)["seed"] == 8
    parents = read_manifest(run.artifact("ppo")).parents
    assert parents["sft"].path == str(run.artifact("sft"))


def test_from_a_run_that_was_started_from_one(driver, first: RunDir, tmp_path: Path) -> None:
    """The first run's models, also where the second has none of its own; the second's settings."""
    assert driver(*KL)[0] == 0
    argv = ["--from", "kl02", "--step", "3", "step3.ppo.gamma=0.8", "--name", "third"]
    assert driver(*argv)[0] == 0
    third = RunDir(tmp_path / "output" / "third")
    assert config_of(third, 3)["step3"]["ppo"]["kl_coef"] == 0.02
    parents = read_manifest(third.artifact("ppo")).parents
    assert parents["sft"].path == str(first.artifact("sft"))
    make_artifact(first.path, 1, config_of(first, 1), weights=b"made again")
    code, _, err = driver(*argv[:-1], "fourth")
    assert code == 3
    assert "which is not there any more" in err


def test_a_run_that_was_moved(driver, first: RunDir, tmp_path: Path) -> None:
    """Its own models wherever it is now; the new run is put beside it."""
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move(first.path, moved)
    argv = ["--from", str(moved), "--step", "3", "--name", "new"]
    options = parse_options(argv, environ={})
    assert options.run.path == tmp_path / "elsewhere" / "new"
    assert options.actor_model == str(RunDir(moved).artifact("sft"))
    assert parse_options([*argv, "--output-dir", "o"], environ={}).run.path == tmp_path / "o/new"


def test_what_is_given_wins(driver, first: RunDir, tmp_path: Path) -> None:
    other = tmp_path / "output" / "other"
    shutil.copytree(first.path, other)
    sft = str(RunDir(other).artifact("sft"))
    options = parse_options([*KL, "--actor-model", sft, "--num-gpus", "2"], environ={})
    assert options.actor_model == sft
    assert options.reward_model == str(first.artifact("reward"))
    assert options.config.launch.deployment_type == "single_node"


def test_each_steps_settings_are_its_own(first: RunDir) -> None:
    """A later command made step 3 again, with another learning rate of step 1 on its line."""
    make_artifact(first.path, 3, parse_options([*OWN[2:], "step3.ppo.lam=0.5"], environ={}).config)
    options = parse_options(["--from", "tiny_cpu", "--step", "3", "--name", "x"], environ={})
    assert options.config.step1.optim.learning_rate == 0.5
    assert options.config.step3.ppo.lam == 0.5


def test_a_step_that_died_has_its_settings(driver, tmp_path: Path) -> None:
    assert driver("--step", "1", "2", "3", "step3.ppo.gamma=0.7", fake="fail", step=3)[0] == 1
    options = parse_options(["--from", "tiny_cpu", "--step", "3", "--name", "x"], environ={})
    assert options.config.step3.ppo.gamma == 0.7


def test_seeds_from_a_run(driver, first: RunDir, tmp_path: Path) -> None:
    code, out, _ = driver(
        "--from", "tiny_cpu", "--step", "3", "--seeds", "1", "2", "--name", "many", "--dry-run"
    )
    assert code == 0
    assert f"{tmp_path / 'output' / 'many-seed2'}" in out


def test_a_damaged_parent_is_refused(driver, first: RunDir) -> None:
    (first.artifact("reward") / "model.safetensors").write_bytes(b"weightz")
    code, out, err = driver(*KL)
    assert code == 3
    assert "is corrupt" in err
    assert "this is step" not in out


def test_models_that_do_not_belong_together(driver, first: RunDir) -> None:
    """SFT was made again after the reward model."""
    make_artifact(first.path, 1, config_of(first, 1), weights=b"made again")
    code, _, err = driver(*KL)
    assert code == 3
    assert "train the reward model again (--step 2 3)" in err


def test_a_secret_that_was_not_written_down(driver, first: RunDir) -> None:
    config = config_of(first, 3)
    config["data"]["path"] = ["https://host/a.jsonl?<redacted>"]
    make_artifact(first.path, 3, config)
    code, _, err = driver(*KL)
    assert code == 2
    assert "data.path" in err
    assert "has a secret in it that was not written down" in err
    options = parse_options([*KL, "--data-path", "sample:courtesy"], environ={})
    assert options.config.data.path == ["sample:courtesy"]


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--name", "x"], 2, "say which steps run anew"),
        (["--step", "3"], 2, "needs a name of its own"),
        (["--step", "3", "--name", "tiny_cpu"], 2, "give the new run another --name"),
        (["--step", "3", "--name", "x", "--config", "tiny_cpu"], 2, "from one of them"),
        (["--step", "3", "--name", "x", "step3.ppo.klcoef=1"], 2, "step3.ppo.kl_coef"),
    ],
)
def test_what_is_refused(driver, first: RunDir, argv: list[str], code: int, said: str) -> None:
    found, _, err = driver("--from", "tiny_cpu", *argv)
    assert found == code
    assert said in err


def test_runs_that_have_nothing_to_start_from(driver, tmp_path: Path) -> None:
    code, _, err = driver("--from", "nowhere", "--step", "3", "--name", "x")
    assert code == 3
    assert "--from nowhere: no such run" in err
    assert driver(fake="fail", step=2)[0] == 1
    code, _, err = driver(*KL)
    assert code == 3
    assert "it has no reward model model" not in err
    assert "no reward model to start from (step 2 reward model: died: rank 0 in train" in err
