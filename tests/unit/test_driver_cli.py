"""The command line and the dry run (C1, C2, C4, C5, C7), and what it may import."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import train
from launch.checklist import Found
from launch.commands import COMMANDS, GROUPS
from launch.looking import Looked
from launch.options import SETTINGS, Options, find_recipe, parse_options
from launch.spec import PROJECT_ROOT
from rlhf.config import load_config
from rlhf.errors import ConfigError
from tests.unit.driver_help import make_artifact

TRAIN = str(PROJECT_ROOT / "train.py")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: the plan is looked at here, tests/unit/test_checks.py has the checks."""
    monkeypatch.setattr(train, "ask_all", lambda plan, way: Found([], Looked(), {}))


def options(*argv: str, **environ: str) -> Options:
    return parse_options(argv, environ)


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code = train.main([*argv, "--dry-run", "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = train.main([*argv, "--dry-run"])
    return code, capsys.readouterr().err


def in_process(*argv: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environ}
    return subprocess.run(
        [sys.executable, TRAIN, *argv], cwd=cwd, env=env, capture_output=True, text=True
    )


def test_a_dry_run_from_another_directory(tmp_path: Path) -> None:
    """C1: the plan and the exact command lines; nothing is written."""
    done = in_process(
        "--step", "1", "2", "3", "--deployment-type", "single_gpu", "--dry-run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for folder in ("step1_sft", "step2_reward", "step3_ppo"):
        assert (
            f"{PROJECT_ROOT}/{folder}/main.py --config {tmp_path}/output/tiny_cpu/{folder}"
            in done.stdout
        )
    assert "deepspeed.launcher.runner" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_costs_next_to_nothing(tmp_path: Path) -> None:
    """No torch import: two seconds of CPU time beyond the interpreter's, the look at the data
    included (a second where nothing else runs)."""

    def cpu(*argv: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *argv], cwd=tmp_path, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    spent = min(cpu(TRAIN, "--dry-run") for _ in range(3))
    assert spent - min(cpu("-c", "pass") for _ in range(3)) < 2


@pytest.mark.parametrize(
    "module", ["train", "launch", "rlhf.config", "rlhf.store", "launch.preflight"]
)
def test_imports_without_torch(module: str, tmp_path: Path) -> None:
    """DESIGN: in a fresh process, torch is not in sys.modules."""
    heavy = ["torch", "transformers", "deepspeed", "datasets", "numpy", "huggingface_hub"]
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_plan_for_machines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = plan(capsys, "--name", "x", "--seed", "7", "step3.ppo.kl_coef=0.02")
    assert found["run_dir"] == str(tmp_path / "output" / "x")
    assert (found["config"]["seed"], found["config"]["step3"]["ppo"]["kl_coef"]) == (7, 0.02)
    assert [step["step"] for step in found["steps"]] == [1, 2, 3]
    assert [step["action"] for step in found["steps"]] == ["run"] * 3
    assert found["steps"][2]["parents"] == {
        "sft": str(tmp_path / "output/x/step1_sft/artifact"),
        "reward": str(tmp_path / "output/x/step2_reward/artifact"),
    }


def test_both_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    """CAPABILITIES: flags are accepted in both spellings."""
    dashes = ["--actor-model", "1.3b", "--reward-model=350m", "--actor-zero-stage", "2"]
    dashes += ["--deployment-type", "single_node", "--num-gpus", "2", "--output-dir", "o"]
    dashes += ["--step3.ppo.kl-coef", "0.5"]
    lines = [a.replace("-", "_").replace("__", "--", 1) for a in dashes]
    first, second = (options(*argv).config for argv in (dashes, lines))
    assert first == second
    assert first.step3.ppo.kl_coef == 0.5


def test_models_and_stages(capsys: pytest.CaptureFixture[str]) -> None:
    """C2: bare sizes; a stage for the actor is that of steps 1 and 3."""
    argv = ["--actor-model", "1.3b", "--reward-model", "350m"]
    found = plan(capsys, *argv, "--actor-zero-stage", "3", "--reward-zero-stage", "2")
    config = found["config"]
    assert config["step1"]["model"]["name"] == "facebook/opt-1.3b"
    assert config["step2"]["model"]["name"] == "facebook/opt-350m"
    stages = [config["step1"], config["step3"]["actor"], config["step2"], config["step3"]["critic"]]
    assert [part["engine"]["zero_stage"] for part in stages] == [3, 3, 2, 2]
    assert config["step3"]["reference_engine"]["zero_stage"] == 3


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--step", "4"], "the pipeline has 1 SFT, 2 reward model, 3 PPO"),
        (["--step", "one"], "invalid int value"),
        (["--deployment-type", "cloud"], "'single_gpu', 'single_node' or 'multi_node'"),
        (["--launcher", "ssh"], "'deepspeed', 'torchrun', 'accelerate' or 'slurm'"),
        (["--actor-zero-stage", "4"], "--actor-zero-stage: step1.engine.zero_stage = 4"),
        (["--actor-modle", "x"], "Did you mean --actor-model?"),
        (["--num-gpus", "two"], "must be a whole number"),
        (
            ["--num-gpus", "2", "--deployment-type", "single_gpu"],
            "use --deployment-type single_node",
        ),
        (["--config", "nowhere.yaml"], "Recipes by name: "),
        (["step3.kl=1"], "Did you mean"),
        (["--step3.ppo.kl_coef"], "a value is missing"),
        (["--hf-endpoint", "ftp://x"], "http:// or https://"),
        (["--num-gpus", "3"], "must be a multiple of 3"),
        (["--name", "a/b"], "must match"),
        (["--seed", "-1"], "seed = -1"),
        (["loose"], "loose: no such verb"),
        (["--include", "a", "--exclude", "b"], "give one of them"),
        (["--deployment-type", "multi_node"], "give --hostfile"),
    ],
)
def test_bad_usage(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    """Exit code 2 (C1: `--step 4` with the choices)."""
    code, err = fails(capsys, *argv)
    assert code == 2, err
    assert said in err
    assert "Traceback" not in err


def test_json_is_for_dry_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--json"]) == 2


def test_overrides_beside_flags() -> None:
    """`key=value` anywhere: after a list, before a flag; a flag's value stays its value."""
    found = options(
        "--step", "1", "2", "seed=3", "--data-path", "a", "b", "name=n", "--output-dir", "x=y"
    )
    config = found.config
    assert found.steps == [1, 2]
    assert (config.seed, config.data.path, config.name) == (3, ["a", "b"], "n")
    assert config.output_dir == "x=y"
    assert options("--step", "3", "1", "3").steps == [1, 3]


def test_the_endpoints_order() -> None:
    """C4: flag, then override, then HF_ENDPOINT, then recipe; an empty flag means none."""
    env = {"HF_ENDPOINT": "https://env.example/"}
    assert options(**env).config.hub.endpoint == "https://env.example"
    assert options("--hf-endpoint", "https://flag.example//", **env).config.hub.endpoint == (
        "https://flag.example"
    )
    assert (
        options("hub.endpoint=https://o.example", **env).config.hub.endpoint == "https://o.example"
    )
    assert options("--hf-endpoint", "", **env).config.hub.endpoint is None
    assert options(HF_ENDPOINT=" ").config.hub.endpoint is None
    assert options(HF_HUB_OFFLINE="1").config.hub.offline is True


def test_the_endpoint_reaches_every_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C4: in the environment of each step's launcher, not in its arguments."""
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    for step in plan(capsys)["steps"]:
        assert step["env"]["HF_ENDPOINT"] == "https://mirror.example"
        assert step["env"]["HF_HUB_DISABLE_XET"] == "1"
        assert "mirror" not in " ".join(step["argv"])


def test_two_processes_on_cpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--num-gpus 2` on CPU: two gloo ranks with one thread each; torchrun by name (C7)."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = plan(capsys, "--num-gpus", "2")
    assert (found["world_size"], found["config"]["launch"]["deployment_type"]) == (2, "single_node")
    assert "--num_gpus=2" in found["steps"][0]["argv"]
    assert found["steps"][0]["env"]["OMP_NUM_THREADS"] == "1"
    found = plan(capsys, "--num-gpus", "2", "--launcher", "torchrun")
    assert "--nproc-per-node=2" in found["steps"][0]["argv"]


def test_many_nodes_are_resolved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """C7: the command for a hostfile; it runs for real in a later issue."""
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\nc slots=2\n")
    found = plan(
        capsys, "--deployment-type", "multi_node", "--hostfile", "hosts", "--num-nodes", "2"
    )
    argv = found["steps"][0]["argv"]
    assert found["world_size"] == 4
    assert f"--hostfile={tmp_path / 'hosts'}" in argv
    assert "--include=a:0,1@b:0,1" in argv


def test_settings_can_be_printed_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--print-config", "--seed", "77"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert options("--config", "mine.yaml").config == options("--seed", "77").config
    assert train.main(["--json-schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)


def test_recipes_are_found(tmp_path: Path) -> None:
    recipe = PROJECT_ROOT / "launch/recipes/tiny_cpu.yaml"
    assert find_recipe(None, None) == recipe
    assert find_recipe("tiny_cpu", None) == recipe
    assert find_recipe("launch/recipes/tiny_cpu.yaml", None) == recipe
    with pytest.raises(ConfigError):
        find_recipe("nowhere", None)


def test_another_base_does_not_get_the_tiny_models_settings() -> None:
    """The embedded default's learning rate would ruin a real model."""
    tuned = load_config(PROJECT_ROOT / "launch/recipes/tiny_cpu.yaml").step1.optim.learning_rate
    assert options("--actor-model", "1.3b").config.step1.optim.learning_rate < tuned / 10
    assert options("--actor-model", "tiny:opt").config.step1.optim.learning_rate == tuned
    chosen = options("--actor-model", "1.3b", "--config", "tiny_cpu")
    assert chosen.config.step1.optim.learning_rate == tuned


def test_a_base_beside_its_artifact_is_noted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """--actor-model names step 1's base; with step 1 in the run its artifact is what counts."""
    run = tmp_path / "output" / "tiny_cpu"
    config = options("--actor-model", "tiny:llama").config
    make_artifact(run, 1, config.model_dump(mode="json"))
    found = plan(capsys, "--step", "2", "--actor-model", "tiny:opt")
    assert found["steps"][0]["parents"] == {"sft": str(run / "step1_sft/artifact")}
    assert "--actor-model tiny:opt is not used" in found["steps"][0]["notes"][0]
    found = plan(capsys, "--step", "2", "--actor-model", "tiny:llama")
    assert found["steps"][0]["notes"] == []


def test_step_2_from_a_base_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """C2: as in DeepSpeed-Chat, a reward model needs no step 1 when it has a base."""
    found = plan(capsys, "--step", "2", "--reward-model", "350m")
    assert found["steps"][0]["parents"] == {}
    assert found["config"]["step2"]["model"]["name"] == "facebook/opt-350m"


def test_step_1_needs_a_base(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("seed: 1")
    code, err = fails(capsys, "--config", "r.yaml")
    assert code == 2
    assert "give --actor-model" in err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--step", "--actor-zero-stage", "--hf-endpoint", "--dry-run", "130 interrupted"):
        assert flag in out
    told = [verb for verbs in GROUPS.values() for verb in verbs]
    assert sorted(told) == sorted([*COMMANDS, "train"]), "every verb, once"
    for verb in told:
        assert re.search(rf"^  {verb} +\w", out, re.M), verb
    for flag in SETTINGS:
        assert len(re.findall(rf"^  {flag}(?: |$)", out, re.M)) == 1, flag
    assert "one of single_gpu, single_node, multi_node; default single_gpu" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 84


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(["--version"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r"rlhf-pipeline \S+.* \(python 3\.\d+\.\d+, torch [^,]+, .*\)\n", out)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["shwo", "x"], "shwo: no such verb. Did you mean show?"),
        (["tiny_cpu"], "tiny_cpu: no such verb. There are train, recipes"),
        (["train", "shwo"], "unrecognized arguments: shwo"),
    ],
)
def test_a_verb_that_does_not_exist(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    code, err = fails(capsys, *argv)
    assert code == 2
    assert said in err


def test_train_is_what_happens_without_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for verb in ([], ["train"]):
        assert train.main([*verb, "--print-config", "step3.ppo.kl_coef=0.5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "kl_coef: 0.5" in texts[0]


@pytest.mark.parametrize("verb", ["chat", "compare", "evaluate", "plan", "recipes", "show"])
def test_each_verb_has_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main([verb, "--help"])
    assert caught.value.code == 0
    assert f" {verb} " in capsys.readouterr().out
