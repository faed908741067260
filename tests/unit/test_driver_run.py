"""The driver from command line to verified artifacts, with fake steps (C1, C3, C6, exit codes)."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launch.plan
import train
from launch.execute import _works
from launch.launchers import LAUNCHERS
from launch.looking import Looked
from launch.spec import PROJECT_ROOT
from rlhf.store import RunDir, read_manifest
from tests.unit.driver_help import (
    data_as_it_is,
    make_artifact,
    plain,
    read,
    write_model,
    write_scripts,
)
from tests.unit.test_launch_supervise import alive, wait_for


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs train.py's main in `tmp_path`: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.plan, "PROJECT_ROOT", tmp_path / "steps")
    monkeypatch.setitem(LAUNCHERS, "deepspeed", plain)
    data_as_it_is(monkeypatch)
    write_scripts(tmp_path / "steps", PROJECT_ROOT)

    def run(*argv: str, fake: str = "ok", step: int | None = None) -> tuple[int, str, str]:
        monkeypatch.setenv("FAKE", fake)
        monkeypatch.delenv("FAKE_STEP", raising=False)
        if step is not None:
            monkeypatch.setenv("FAKE_STEP", str(step))
        code = train.main(list(argv))
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_all_three_steps(driver, tmp_path: Path) -> None:
    """C1: no --step means all; C6: console and log; the verdict is shown."""
    code, out, err = driver()
    assert (code, err) == (0, "")
    run = RunDir(tmp_path / "output" / "tiny_cpu")
    ids = {step: read_manifest(run.step_dir(step) / "artifact").id for step in (1, 2, 3)}
    last = read_manifest(run.artifact("ppo"))
    assert {name: parent.id for name, parent in last.parents.items()} == {
        "sft": ids[1],
        "reward": ids[2],
    }
    positions = [out.index(f"this is step {step} as ok") for step in (1, 2, 3)]
    assert positions == sorted(positions)
    assert "reward 1.0 -> 2.0" in out
    for step in (1, 2, 3):
        assert f"step {step} done" in out
        assert "this is step" in (run.logs(step) / "console.log").read_text()
        assert read(run.resolved(step))["step"] == step
    assert read(run.resolved(2))["config"]["step2"]["max_length"] == 128
    assert "step2.max_length = 128 (inherited from step 1)" in out


def test_what_is_done_is_not_done_again(driver, tmp_path: Path) -> None:
    """A step whose artifact verifies and whose settings are the same is skipped."""
    assert driver()[0] == 0
    run = RunDir(tmp_path / "output" / "tiny_cpu")
    before = read_manifest(run.artifact("sft")).id
    code, out, err = driver("launch.threads=2")
    assert code == 0, err
    assert out.count("already done") == 3
    assert "this is step" not in out
    code, out, _ = driver("--step", "2", "3", "step2.optim.learning_rate=0.5", "--force")
    assert code == 0
    assert [f"this is step {n}" in out for n in (1, 2, 3)] == [False, True, True]
    assert read_manifest(run.artifact("sft")).id == before


@pytest.mark.parametrize("way", ["run", "dry-run", "doctor"])
def test_nothing_finished_is_replaced_unasked(driver, tmp_path: Path, way: str) -> None:
    """Issue 10, 5: what would be replaced, when it was made and its figures; exit code 2."""
    assert driver()[0] == 0
    run = RunDir(tmp_path / "output" / "tiny_cpu")
    before = {step: read_manifest(run.step_dir(step) / "artifact") for step in (1, 2, 3)}
    changed = ["step2.optim.learning_rate=0.5"]
    argv = {"run": changed, "dry-run": [*changed, "--dry-run"], "doctor": ["doctor", *changed]}
    code, out, err = driver(*argv[way])
    assert code == 2
    assert "this is step" not in out
    said = out if way == "doctor" else err
    for step, kind in ((2, "reward model"), (3, "PPO")):
        made = before[step]
        told = f"FAIL step {step} is finished: {kind} artifact {made.id[:12]}, made {made.created}"
        assert told in said
    assert "accuracy 0.75 would be replaced: settings changed: step2.optim.learning_rate" in said
    assert "0.001 -> 0.5" in said
    assert "would be replaced: step 2 runs again" in said
    assert "--force; to keep it: another --name" in said
    after = {step: read_manifest(run.step_dir(step) / "artifact").id for step in (1, 2, 3)}
    assert after == {step: manifest.id for step, manifest in before.items()}
    assert driver(*changed, "--name", "other")[0] == 0


GREW = {"name": "sample:courtesy", "fingerprint": "e" * 64, "rows": 112}


@pytest.mark.parametrize("way", ["run", "dry-run", "doctor"])
def test_other_data_under_the_same_name(driver, monkeypatch, tmp_path: Path, way: str) -> None:
    """Issue 11: step 1 is done, and its data has grown since: the change is named; exit code 2."""
    assert driver("--step", "1")[0] == 0
    data_as_it_is(monkeypatch, [GREW])
    argv = {"run": [], "dry-run": ["--dry-run"], "doctor": ["doctor"]}[way]
    code, out, err = driver(*argv)
    said = out if way == "doctor" else err
    assert code == 2
    assert "this is step" not in out
    assert "was made from other data: data.path sample:courtesy has 12 more rows than then" in said
    assert "--force; to keep it and go on: --resume always" in said


def test_who_chooses_between_old_and_new_data(driver, monkeypatch, tmp_path: Path) -> None:
    assert driver("--step", "1")[0] == 0
    run = RunDir(tmp_path / "output" / "tiny_cpu")
    before = read_manifest(run.artifact("sft")).id
    data_as_it_is(monkeypatch, [{**GREW, "rows": 100}])
    code, out, _ = driver("--step", "1", "--resume", "always")
    assert code == 0
    assert "has other content than then (now eeeeeeeeeeee); it is kept (--resume always)" in out
    assert read_manifest(run.artifact("sft")).id == before
    assert driver("--step", "1", "--force")[0] == 0
    assert read_manifest(run.artifact("sft")).id != before
    assert driver("--step", "1")[0] == 0


def test_data_that_changes_during_the_command(driver, monkeypatch, tmp_path: Path) -> None:
    """Replaced while step 1 was running: step 2 does not start on other rows unasked."""
    data_as_it_is(monkeypatch)
    now = Looked(sources=[GREW])
    monkeypatch.setattr(train, "look_at_data", lambda plan: now)
    code, out, err = driver()
    assert code == 2
    assert "step 1 done" in out
    assert "this is step 2" not in out
    assert "step 2: the data changed while this command was running" in err
    assert "12 more rows" in err


def test_a_checkpoint_of_other_data(driver, monkeypatch) -> None:
    """Not even --resume always: what it has seen would be other rows."""
    assert driver("--step", "1", fake="save_and_fail")[0] == 1
    data_as_it_is(monkeypatch, [GREW])
    for more in ((), ("--resume", "always")):
        code, _, err = driver("--step", "1", *more)
        assert code == 2
        assert "step 1 goes on from step-00000007: it was saved with other data" in err
    assert driver("--step", "1", "--resume", "never")[0] == 0


def test_force_names_what_no_longer_fits(driver) -> None:
    """Step 1 alone is made again: steps 2 and 3 were made from what it replaces."""
    assert driver()[0] == 0
    code, out, _ = driver("--step", "1", "--force")
    assert code == 0
    assert "step 1 replaces SFT artifact " in out
    for step in (2, 3):
        assert f"  step {step} (" in out
    assert out.count("was made from it and no longer fits") == 2
    code, _, err = driver("--step", "2")
    assert code == 2
    assert "would be replaced: its sft parent is another one now; step 3 (PPO artifact" in err


def test_force(driver) -> None:
    assert driver("--step", "1")[0] == 0
    code, out, _ = driver("--step", "1", "--force")
    assert code == 0
    assert "again: --force" in out
    assert "this is step 1" in out


def test_a_broken_artifact_is_made_again(driver, tmp_path: Path) -> None:
    """One flipped byte is caught; the step's own command repairs it, the next one refuses."""
    assert driver("--step", "1", "2")[0] == 0
    weights = tmp_path / "output/tiny_cpu/step1_sft/artifact/model.safetensors"
    weights.write_bytes(b"weightz")
    code, _, err = driver("--step", "2")
    assert code == 3
    assert "is corrupt" in err
    assert "python train.py --step 1" in err
    code, out, _ = driver("--step", "1")
    assert code == 0
    assert "again: its artifact does not verify" in out
    code, _, err = driver("--step", "2")
    assert code == 2
    assert "its sft parent is another one now" in err
    assert driver("--step", "2", "--force")[0] == 0


def test_the_stage_gate_names_the_command(driver, tmp_path: Path) -> None:
    """C3: without steps 1 and 2, exit 3 and the exact command, with the same flags."""
    code, _, err = driver("--step", "3", "--name", "x", "step3.ppo.kl_coef=0.1")
    assert code == 3
    assert "python train.py --step 1 --name x step3.ppo.kl_coef=0.1" in err
    assert "--actor-model" in err
    assert driver("--step", "1", "--name", "x")[0] == 0
    code, _, err = driver("--step", "3", "--name", "x")
    assert code == 3
    assert "python train.py --step 2 --name x" in err
    assert "--reward-model" in err


def test_a_deleted_artifact(driver, tmp_path: Path) -> None:
    """C3: delete an artifact: exit 3, names the command; not even a model of one's own helps."""
    assert driver("--step", "1")[0] == 0
    manifest = tmp_path / "output/tiny_cpu/step1_sft/artifact/MANIFEST.json"
    manifest.unlink()
    for extra in ((), ("--actor-model", "tiny:llama")):
        code, _, err = driver("--step", "2", *extra)
        assert code == 3
        assert "never finished" in err
        assert "python train.py --step 1" in err


def test_a_failing_step(driver, tmp_path: Path) -> None:
    """Exit code 1: log, phase, remedy; the steps after it do not start."""
    code, out, err = driver(fake="fail", step=2)
    assert code == 1
    assert "step 2 failed" in err
    assert "rank 0 in train: RuntimeError: it broke" in err
    assert "  | Traceback: it broke" in err
    assert "this is step 3" not in out
    code, out, _ = driver()
    assert code == 0
    assert "already done" in out
    assert "this is step 1" not in out


def test_a_success_without_an_artifact_is_a_failure(driver) -> None:
    """DESIGN: a step is done when its manifest verifies, never because of its exit code."""
    code, _, err = driver("--step", "1", fake="nothing")
    assert code == 1
    assert "it reported success, but its artifact does not verify" in err


def test_an_earlier_artifact_is_not_taken_for_a_new_one(driver) -> None:
    assert driver("--step", "1")[0] == 0
    code, _, err = driver("--step", "1", "--force", fake="nothing")
    assert code == 1
    assert "is that of an earlier run" in err


def test_a_crash_after_publishing_is_no_failure(driver) -> None:
    """The artifact verifies: that is what counts. A rank's own failure record counts too."""
    code, out, _ = driver("--step", "1", fake="crash_after")
    assert code == 0
    assert "warning: after publishing, its processes ended with exit code 1" in out
    code, _, err = driver("--step", "1", "--force", fake="record_after")
    assert code == 1
    assert "it broke" in err


def test_a_requirement_found_by_the_step(driver) -> None:
    code, _, err = driver("--step", "1", fake="requirement")
    assert code == 3
    assert err == "error: step 1: rows.jsonl: no rows; give --data-path\n"


def test_out_of_memory(driver) -> None:
    """C8."""
    code, _, err = driver("--step", "1", fake="memory")
    assert code == 1
    assert "Lower step1.train.micro_batch_size" in err


def test_foreign_models(driver, tmp_path: Path) -> None:
    """C3: a Hugging Face directory is accepted instead of a step, and the plan says so."""
    for name in ("actor", "judge"):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name)
    code, out, _ = driver(
        "--step", "3", "--actor-model", "actor", "--reward-model", "judge", "--name", "new"
    )
    assert code == 0
    assert f"--actor-model: {tmp_path / 'actor'} serves as the SFT model" in out
    resolved = read(tmp_path / "output/new/step3_ppo/resolved.json")
    assert resolved["parents"] == {
        "sft": str(tmp_path / "actor"),
        "reward": str(tmp_path / "judge"),
    }


def test_an_artifact_of_another_run(driver, tmp_path: Path) -> None:
    """Its manifest is verified and its settings are inherited; a wrong kind is refused."""
    assert driver("--step", "1", "2", "--name", "old", "step1.max_prompt_length=40")[0] == 0
    old = tmp_path / "output" / "old"
    models = [str(old / folder / "artifact") for folder in ("step1_sft", "step2_reward")]
    argv = ["--step", "3", "--name", "new", "--actor-model", models[0], "--reward-model", models[1]]
    code, out, _ = driver(*argv)
    assert code == 0
    assert "step3.rollout.max_prompt_length = 40 (inherited from step 1)" in out
    code, _, err = driver(
        *argv[:4], "--actor-model", models[1], "--reward-model", models[1], "seed=1"
    )
    assert code == 3
    assert "this is a 'reward' artifact, a 'sft' artifact is needed" in err


@pytest.mark.parametrize(
    ("name", "said"),
    [("./nowhere", "no such file or directory"), ("empty", "no model in this directory")],
)
def test_a_foreign_model_that_is_none(driver, tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = driver("--step", "2", "--actor-model", name, "--name", "n")
    assert code == 3
    assert said in err


def test_other_tokenizers_do_not_fit(driver, tmp_path: Path) -> None:
    """STYLE 15: the reward model must read the actor's tokens."""
    assert driver("--step", "1", "2")[0] == 0
    path = tmp_path / "output/tiny_cpu/step2_reward/artifact"
    manifest = read_manifest(path)
    from rlhf.store import publish

    publish(
        path.parent,
        lambda directory: (directory / "w").write_bytes(b"x") and None,
        kind="reward",
        step=2,
        parents={n: p.model_dump() for n, p in manifest.parents.items()},
        data_fingerprint="d",
        tokenizer_fingerprint="u" * 64,
        config=manifest.config,
        metrics={},
    )
    code, _, err = driver("--step", "3")
    assert code == 3
    assert "was trained with tokenizer uuuuuuuu, the actor's" in err
    assert "retrain step 2" in err


def test_another_runs_artifact_in_the_place_of_ours(driver, tmp_path: Path) -> None:
    """Issue 5: whole and verified, but not the one that step 2 was trained from: its id tells."""
    assert driver()[0] == 0
    assert driver("--name", "other", "--seed", "5", "--step", "1")[0] == 0
    run, other = RunDir(tmp_path / "output/tiny_cpu"), RunDir(tmp_path / "output/other")
    shutil.rmtree(run.artifact("sft"))
    shutil.copytree(other.artifact("sft"), run.artifact("sft"))
    code, _, err = driver("--step", "3")
    assert code == 3
    assert f"but {run.artifact('sft')} is {read_manifest(run.artifact('sft')).id[:12]}" in err
    assert "--step 2 3" in err
    assert driver("--step", "2", "3", "--force")[0] == 0
    # Made again, without step 2: the same.
    assert driver("--step", "1", "--force")[0] == 0
    assert driver("--step", "3")[0] == 3


def test_what_the_run_writes_down(driver, tmp_path: Path) -> None:
    """pipeline.json and command.sh; a planted token is in none of the run's files (Y6)."""
    os.environ["HF_TOKEN"] = "hf_planted_secret"
    try:
        assert driver("--step", "1", "--seed", "9")[0] == 0
        assert driver("--step", "1", "--seed", "9")[0] == 0
    finally:
        del os.environ["HF_TOKEN"]
    run = RunDir(tmp_path / "output" / "tiny_cpu")
    pipeline = read(run.pipeline)
    assert pipeline["asked"] == ["--step", "1", "--seed", "9"]
    assert pipeline["steps"][0]["action"] == "skip"
    assert pipeline["earlier"][0]["steps"][0]["action"] == "run"
    assert "torch" in pipeline["versions"]
    script = run.command(1)
    assert script.stat().st_mode & stat.S_IXUSR
    for path in run.path.rglob("*"):
        if path.is_file():
            assert b"hf_planted_secret" not in path.read_bytes(), path
    (run.step_dir(1) / "artifact").rename(tmp_path / "aside")
    done = subprocess.run([str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_manifest(run.artifact("sft")).step == 1


def test_a_busy_port(driver) -> None:
    """C5: 29500 busy does no harm; asked for, it is explained."""
    import socket

    with socket.socket() as busy:
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        busy.bind(("", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        code, _, err = driver("--master-port", port)
        assert code == 3
        assert f"--master-port {port}: the port is in use" in err
        assert driver("--step", "1")[0] == 0


def test_one_driver_per_run_directory(driver, tmp_path: Path) -> None:
    from launch.execute import locked

    with locked(tmp_path / "output" / "tiny_cpu"):
        code, _, err = driver("--step", "1")
    assert code == 3
    assert "another train.py is working" in err


def test_a_driver_that_has_ended_works_no_more() -> None:
    """A zombie, whose parent has not asked for its end yet, still has its number."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = f"{child.pid} {platform.node()}"
    assert _works(owner)
    assert child.stdin is not None
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and not asked for
    assert not _works(owner)
    child.wait()
    assert not _works(owner)


DRIVE = """
import pathlib, sys
sys.path.insert(0, {root!r})
import launch.plan, train
from launch.launchers import LAUNCHERS
from tests.unit.driver_help import plain
launch.plan.PROJECT_ROOT = pathlib.Path({steps!r})
LAUNCHERS["deepspeed"] = plain
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt(tmp_path: Path, number: signal.Signals) -> None:
    """Exit code 130 or 143: children end too, none is orphaned; what was done stays done."""
    write_scripts(tmp_path / "steps", PROJECT_ROOT)
    code = DRIVE.format(root=str(PROJECT_ROOT), steps=str(tmp_path / "steps"))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "FAKE": "sleep", "FAKE_STEP": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    mark = tmp_path / "output/tiny_cpu/asleep"
    child = int(
        wait_for(lambda: mark.exists() and mark.read_text().endswith("\n") and mark.read_text())
    )
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert time.monotonic() - began < 30
    assert "interrupted" in err
    assert not alive(child)
    assert read_manifest(tmp_path / "output/tiny_cpu/step1_sft/artifact").kind == "sft"


def test_make_artifact_is_what_the_driver_expects(tmp_path: Path) -> None:
    """The fake writes what a real step writes: a manifest with the whole run's configuration."""
    from rlhf.config import RunConfig

    make_artifact(tmp_path, 1, RunConfig().model_dump(mode="json"))
    manifest = read_manifest(tmp_path / "step1_sft" / "artifact")
    assert json.loads(json.dumps(manifest.config)) == RunConfig().model_dump(mode="json")
