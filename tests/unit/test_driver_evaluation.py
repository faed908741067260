"""The driver and step 3's evaluation: made up for, repeated, told when it fails; `--seeds`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import seeds
from launch.options import parse_options
from rlhf.store import RunDir, find_evaluation, read_manifest, verify
from tests.unit.driver_help import make_artifact, read
from tests.unit.test_driver_run import driver

__all__ = ["driver"]  # a fixture


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "output" / "tiny_cpu")


def test_a_run_that_was_cut_off_before_its_verdict(driver, run: RunDir, monkeypatch) -> None:
    """Step 3 is published, its evaluation is not: told, exit 1; the same command makes up for it,
    and trains nothing; a third time there is nothing to do."""
    monkeypatch.setenv("FAKE_EVALUATION", "killed")
    code, _, err = driver()
    assert code == 1
    assert "the evaluation failed" in err
    assert f"The trained models are published in {run.artifact('ppo')}" in err
    assert f"python train.py evaluate {run.path}" in err
    policy = verify(run.artifact("ppo"), "ppo")
    code, out, _ = driver("--dry-run")
    assert "evaluation runs: it has not been evaluated" in out
    code, out, err = driver()
    assert (code, err) == (0, "")
    assert "step 3 is done, but it has not been evaluated: its evaluation starts" in out
    assert "this is step" not in out, "nothing is trained"
    assert out.count("verdict of None") == 1
    assert read_manifest(run.artifact("ppo")).id == policy.id
    assert read(run.resolved(3, "evaluation"))["step"] == 3
    code, out, _ = driver()
    assert code == 0
    assert "this is the evaluation" not in out
    assert "verdict of None" in out


def test_a_failure_in_the_evaluation_is_none_of_the_training(driver, run: RunDir, monkeypatch):
    """Its record comes after the publishing: no restart, the artifact stays, exit 1."""
    monkeypatch.setenv("FAKE_EVALUATION", "none")
    code, out, err = driver("--max-restarts", "2", fake="record_after", step=3)
    assert code == 1
    assert out.count("this is step 3") == 1
    assert "it broke" in err
    verify(run.artifact("ppo"), "ppo")


def test_a_verdict_on_another_policy_is_none(driver, run: RunDir) -> None:
    assert driver()[0] == 0
    made = read_manifest(run.artifact("ppo"))
    config, parents = made.config, {k: v.path for k, v in made.parents.items()}
    from rlhf.store import publish

    publish(
        run.step_dir(3),
        lambda directory: (directory / "model.safetensors").write_bytes(b"others") and None,
        kind="ppo",
        step=3,
        parents={k: v.model_dump() for k, v in made.parents.items()},
        data_fingerprint="d" * 64,
        tokenizer_fingerprint="t" * 64,
        config=config,
        metrics={},
    )
    assert find_evaluation(run) == (None, "its evaluation is that of an earlier policy")
    code, out, _ = driver()
    assert code == 0
    assert "this is the evaluation" in out
    assert "reward 1.0 -> 2.0" not in out
    make_artifact(run.path, 3, config, parents)
    assert find_evaluation(run)[0] is None


def test_another_judge_does_not_train_again(driver, run: RunDir) -> None:
    """step3.eval.* is how a policy is looked at, not what it is; the plan has the command."""
    assert driver()[0] == 0
    assert "its evaluation was made with" not in driver("--dry-run")[1]
    code, out, _ = driver("step3.eval.judge=vader", "step3.eval.prompts=7", "--dry-run")
    assert code == 0
    assert out.count("already done") == 3
    line = next(line for line in out.splitlines() if "its evaluation was made with" in line)
    assert "step3.eval.judge None" in line
    assert "step3.eval.prompts 128" in line
    assert f"python train.py evaluate {run.path} step3.eval." in out


def test_evaluate_again(driver, run: RunDir) -> None:
    """The run's own settings, but for what is given; the old verdict is replaced after success."""
    assert driver("step3.ppo.kl_coef=0.07")[0] == 0
    code, out, err = driver("evaluate", str(run.path), "--judge", "courtesy", "--prompts", "9")
    assert (code, err) == (0, "")
    assert out.rstrip().endswith("verdict of courtesy")
    told = read(run.resolved(3, "evaluation"))
    assert told["config"]["step3"]["eval"]["prompts"] == 9
    assert told["config"]["step3"]["ppo"]["kl_coef"] == 0.07
    assert told["parents"] == {
        "sft": str(run.artifact("sft")),
        "reward": str(run.artifact("reward")),
    }
    assert read(run.resolved(3))["config"]["step3"]["eval"]["prompts"] == 128, "step 3's own"
    code, _, err = driver("evaluate", str(run.path), "--judge", "bad:judge")
    assert code == 1
    assert "judge 'bad:judge' raised" in err
    assert "the verdict that was there stays" in err
    text = (run.artifact("evaluation") / "verdict.txt").read_text()
    assert text == "verdict of courtesy\n"


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["nowhere"], 3, "no such run"),
        (["tiny_cpu", "--prompts", "0"], 2, "step3.eval.prompts"),
        (["tiny_cpu", "--jugde", "x"], 2, "Did you mean --judge?"),
        (["tiny_cpu", "step3.eval.jugde=x"], 2, "step3.eval.judge"),
    ],
)
def test_evaluate_what_cannot_be(driver, argv: list[str], code: int, said: str) -> None:
    assert driver()[0] == 0
    found, _, err = driver("evaluate", *argv)
    assert found == code, err
    assert said in err


def test_evaluate_a_run_without_a_policy(driver) -> None:
    assert driver("--step", "1")[0] == 0
    code, _, err = driver("evaluate", "tiny_cpu")
    assert code == 3
    assert "python train.py --step 3" in err


def test_a_run_that_was_moved(driver, run: RunDir, tmp_path: Path) -> None:
    """Its parents are where it is now."""
    assert driver()[0] == 0
    moved = tmp_path / "elsewhere"
    run.path.rename(moved)
    assert driver("evaluate", str(moved))[0] == 0
    told = read(RunDir(moved).resolved(3, "evaluation"))
    assert told["parents"]["sft"] == str(RunDir(moved).artifact("sft"))


def test_seeds(driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run for each seed; a failing one costs the others nothing; what is done is skipped."""
    pooled: list[list[str]] = []
    monkeypatch.setattr(
        seeds, "pool", lambda runs, place: pooled.append([r.path.name for r in runs])
    )
    code, out, err = driver("--seeds", "7", "8", "--name", "x")
    assert (code, err) == (0, "")
    for seed in (7, 8):
        made = RunDir(tmp_path / "output" / f"x-seed{seed}")
        assert read_manifest(made.artifact("ppo")).config["seed"] == seed
    assert pooled == [["x-seed7", "x-seed8"]]
    code, out, err = driver("--seeds", "6", "7", "8", "--name", "x", fake="fail", step=2)
    assert code == 1
    assert "seed 6 failed with exit code 1" in err
    assert out.count("already done") == 6
    assert pooled[1:] == [["x-seed7", "x-seed8"]]
    code, out, _ = driver("--seeds", "5", "4", "--step", "1", "name=y")
    assert code == 0
    assert len(pooled) == 2, "without step 3 there is nothing to pool"
    assert (tmp_path / "output" / "y-seed5").is_dir()


def test_seeds_dry_run(driver, tmp_path: Path) -> None:
    code, out, _ = driver("--seeds", "0", "1", "--dry-run", "--json")
    assert code == 0
    assert [plan["config"]["seed"] for plan in json.loads(out)["seeds"]] == [0, 1]
    code, out, _ = driver("--seeds", "0", "1", "--dry-run")
    assert code == 0
    assert "tiny_cpu-seed0" in out
    assert "tiny_cpu-seed1" in out
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seeds", "0", "1", "--seed", "3"], "give one of them"),
        (["--seeds", "0", "1", "seed=3"], "give one of them"),
        (["--seeds", "0", "0"], "given twice"),
        (["--seeds", "0", "1", "--print-config"], "--seed instead of --seeds"),
        (["--seeds", "x"], "invalid int value"),
        (["--seeds", "-1", "2"], "seed"),
    ],
)
def test_seeds_refused(driver, argv: list[str], said: str) -> None:
    code, _, err = driver(*argv)
    assert code == 2
    assert said in err


def test_a_run_where_the_pooled_verdict_goes(driver) -> None:
    assert driver("--step", "1", "--name", "x-seeds")[0] == 0
    code, _, err = driver("--seeds", "0", "1", "--name", "x")
    assert code == 2
    assert "choose another --name" in err


def test_one_command_line_for_each_seed() -> None:
    options = parse_options(
        [
            "--step",
            "1",
            "2",
            "--seeds",
            "3",
            "4",
            "--num_gpus",
            "2",
            "--name=a",
            "track.trackers=[]",
        ]
    )
    (one, other) = seeds.runs(options)
    assert one.argv == [
        "--step", "1", "2", "--num-gpus", "2", "track.trackers=[]",
        "--seed", "3", "--name", "a-seed3",
    ]  # fmt: skip
    assert parse_options(one.argv).config.seed == 3
    assert parse_options(other.argv).run.path.name == "a-seed4"
