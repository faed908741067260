"""Command lines, variables and ports: what exactly is started."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from launch import deepspeed, environment, torchrun
from launch.environment import child_environment
from launch.launchers import LAUNCHERS
from launch.ports import choose_port, free_port, port_problem
from launch.spec import PROJECT_ROOT, LaunchSpec, Placement
from rlhf.config import load_config
from rlhf.config.load import parse_overrides
from rlhf.config.schema import LaunchConfig
from rlhf.errors import ConfigError, RequirementError

SCRIPT = Path("/p/step1_sft/main.py")
ARGS = ["--config", "/r/resolved.json"]
RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=error"]
HERE = Placement("cpu", {"localhost": [0, 1]}, "127.0.0.1", 4567)


def nodes(**changes) -> Placement:
    fields = {"hosts": {"a": [0, 1], "b": [0, 1]}, "master_addr": None, "master_port": 29500}
    return Placement("cuda", **{**fields, "multi_node": True, "hostfile": "/h", **changes})


def test_the_launchers_of_the_schema_exist() -> None:
    """C7."""
    named = get_args(LaunchConfig.model_fields["launcher"].annotation)
    assert set(LAUNCHERS) == set(named) == {"deepspeed", "torchrun", "accelerate", "slurm"}


def test_deepspeed_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(deepspeed, "DEFAULT_HOSTFILE", tmp_path / "absent")
    expected = [*RUNNER, "--num_gpus=2", "--master_port=4567", str(SCRIPT), *ARGS]
    assert deepspeed.command(SCRIPT, ARGS, HERE) == expected


def test_a_hostfile_of_the_image_is_not_read_unasked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """deepspeed would take /job/hostfile, if there is one, and start on other machines."""
    monkeypatch.setattr(deepspeed, "DEFAULT_HOSTFILE", tmp_path)
    assert f"--hostfile={os.devnull}" in deepspeed.command(SCRIPT, ARGS, HERE)


def test_deepspeed_with_chosen_devices() -> None:
    """Y3: `--num_gpus=2` would mean devices 0 and 1 and ignore CUDA_VISIBLE_DEVICES."""
    chosen = Placement("cuda", {"localhost": [2, 3]}, "127.0.0.1", 1, any_devices=False)
    command = deepspeed.command(SCRIPT, ARGS, chosen)
    assert "--include=localhost:2,3" in command
    assert not any(argument.startswith("--num_gpus") for argument in command)


def test_deepspeed_on_many_nodes() -> None:
    """C7."""
    options = ["--hostfile=/h", "--include=a:0,1@b:0,1"]
    command = deepspeed.command(SCRIPT, ARGS, nodes())
    assert command == [*RUNNER, *options, "--master_port=29500", str(SCRIPT), *ARGS]
    by_hand = deepspeed.command(SCRIPT, ARGS, nodes(node_rank=1, master_addr="10.0.0.1"))
    assert by_hand[4:9] == [*options, "--master_addr=10.0.0.1", "--no_ssh", "--node_rank=1"]
    assert "--force_multi" in deepspeed.command(SCRIPT, ARGS, nodes(hosts={"a": [0]}))


def test_deepspeed_takes_our_options() -> None:
    """Its own parser accepts every option that we build."""
    code = (
        "import sys, json; from deepspeed.launcher.runner import parse_args;"
        "print(json.dumps([vars(parse_args(a)) for a in json.loads(sys.argv[1])]))"
    )
    import json

    lines = [
        deepspeed.command(SCRIPT, ARGS, place)[3:]
        for place in (HERE, nodes(), nodes(node_rank=1, master_addr="x"), nodes(hosts={"a": [0]}))
    ]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(lines)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    parsed = json.loads(done.stdout.splitlines()[-1])
    assert [p["user_script"] for p in parsed] == [str(SCRIPT)] * 4
    assert [p["user_args"] for p in parsed] == [ARGS] * 4
    assert (parsed[0]["num_gpus"], parsed[0]["master_port"]) == (2, 4567)
    assert (parsed[2]["no_ssh"], parsed[2]["node_rank"]) == (True, 1)


def test_torchrun() -> None:
    """C7: the port is ours, since torchrun hangs on port 0."""
    assert torchrun.command(SCRIPT, ARGS, HERE) == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        "--nproc-per-node=2",
        "--master-addr=127.0.0.1",
        "--master-port=4567",
        str(SCRIPT),
        *ARGS,
    ]
    command = torchrun.command(SCRIPT, ARGS, nodes(node_rank=1, master_addr="x"))
    assert command[3:8] == [
        "--nnodes=2",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=x:29500",
        "--rdzv-id=rlhf-29500",
    ]
    assert "--rdzv-endpoint=a:29500" in torchrun.command(SCRIPT, ARGS, nodes())


def test_torchrun_says_what_it_cannot_do() -> None:
    uneven = nodes(hosts={"a": [0], "b": [0, 1]}, node_rank=0, master_addr="x")
    with pytest.raises(ConfigError, match="same number of processes on every node"):
        torchrun.command(SCRIPT, ARGS, uneven)


def env_of(*overrides: str, placement: Placement = HERE, **environ: str):
    config = load_config(None, parse_overrides(overrides))
    return child_environment(config, placement, environ)


ONE = Placement("cpu", {"localhost": [0]}, "127.0.0.1", 1)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several CPU ranks: one thread each; one: all cores; what the user says goes first."""
    monkeypatch.setattr(environment, "cpu_cores", lambda: 6)
    assert env_of()[0]["OMP_NUM_THREADS"] == "1"
    assert env_of(placement=ONE)[0]["OMP_NUM_THREADS"] == "6"
    assert env_of(placement=ONE, OMP_NUM_THREADS="3")[0]["OMP_NUM_THREADS"] == "3"
    assert env_of("launch.threads=2", OMP_NUM_THREADS="3")[0]["OMP_NUM_THREADS"] == "2"
    gpu = Placement("cuda", {"localhost": [0]}, "127.0.0.1", 1)
    assert "OMP_NUM_THREADS" not in env_of(placement=gpu)[0]


def test_a_cpu_process_keeps_the_memory_that_it_frees() -> None:
    """Where that has been decided and the user has not set glibc up; GPUs have their own."""
    gpu = Placement("cuda", {"localhost": [0]}, "127.0.0.1", 1)
    kept = "launch.keep_memory=true"
    assert "glibc.malloc.hugetlb=1" in env_of(kept, placement=ONE)[0]["GLIBC_TUNABLES"]
    assert "GLIBC_TUNABLES" not in env_of("launch.keep_memory=false", placement=ONE)[0]
    assert "GLIBC_TUNABLES" not in env_of(kept, placement=ONE, MALLOC_ARENA_MAX="2")[0]
    assert "GLIBC_TUNABLES" not in env_of(kept, placement=ONE, GLIBC_TUNABLES="")[0]
    assert "GLIBC_TUNABLES" not in env_of(kept, placement=gpu)[0]


def test_scripts_run_without_an_install() -> None:
    assert env_of()[0]["PYTHONPATH"] == str(PROJECT_ROOT)
    assert env_of(PYTHONPATH="/x:/y")[0]["PYTHONPATH"] == f"{PROJECT_ROOT}:/x:/y"


def test_the_hubs_variables() -> None:
    """C4: on every rank before any import; xet would fetch past a mirror."""
    env, unset = env_of("hub.endpoint=https://mirror.example/")
    assert env["HF_ENDPOINT"] == "https://mirror.example"
    assert env["HF_HUB_DISABLE_XET"] == "1"
    assert "HF_HUB_DISABLE_XET" not in env_of("hub.endpoint=https://huggingface.co")[0]
    assert "HF_HUB_DISABLE_XET" not in env_of("hub.endpoint=http://m", HF_HUB_DISABLE_XET="0")[0]
    env, unset = env_of(HF_ENDPOINT="")
    assert "HF_ENDPOINT" not in env
    assert unset == ["HF_ENDPOINT"]
    assert env_of("hub.offline=true")[0]["HF_HUB_OFFLINE"] == "1"


def test_chosen_devices_reach_each_launcher() -> None:
    """deepspeed has them in --include and must not see the variable; torchrun needs it."""
    chosen = Placement("cuda", {"localhost": [2, 3]}, "127.0.0.1", 1, any_devices=False)
    env, unset = env_of(placement=chosen, CUDA_VISIBLE_DEVICES="2,3")
    assert "CUDA_VISIBLE_DEVICES" in unset
    assert "CUDA_VISIBLE_DEVICES" not in env
    env, unset = env_of("launch.launcher=torchrun", placement=chosen, CUDA_VISIBLE_DEVICES="2,3,4")
    assert env["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_a_secret_is_inherited_never_listed() -> None:
    """Y6."""
    env, _ = env_of(HF_TOKEN="hf_planted", WANDB_API_KEY="k")
    assert not {"HF_TOKEN", "WANDB_API_KEY"} & set(env)
    spec = LaunchSpec(["x"], env, "/")
    assert spec.environment({"HF_TOKEN": "hf_planted"})["HF_TOKEN"] == "hf_planted"
    assert "hf_planted" not in spec.shell()


def test_the_script_runs_as_the_driver_would(tmp_path: Path) -> None:
    """command.sh: awkward arguments, directory and variables arrive whole."""
    folder = tmp_path / "a 'b'"
    folder.mkdir()
    show = (
        "import os, sys; print([*sys.argv[1:], os.getcwd(), os.environ['V'], 'GONE' in os.environ])"
    )
    argv = [sys.executable, "-c", show, "it's", "$HOME", "a b", "*"]
    spec = LaunchSpec(
        argv, {"V": 'say "x" $PATH', "PYTHONPATH": f"{PROJECT_ROOT}:/q"}, str(folder), ["GONE"]
    )
    done = subprocess.run(
        ["sh", "-c", spec.shell()], capture_output=True, text=True, env={**os.environ, "GONE": "1"}
    )
    assert done.stdout.strip() == str(
        ["it's", "$HOME", "a b", "*", str(folder), 'say "x" $PATH', False]
    ), done.stderr
    assert shlex.split(spec.shell().splitlines()[-1])[1:] == argv


def test_ports() -> None:
    """C5: a busy port does no harm unless it was asked for, and then it is explained."""
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        assert port_problem(taken) is not None
        with pytest.raises(RequirementError) as caught:
            choose_port(taken)
        assert f"--master-port {taken}: the port is in use" in str(caught.value)
        assert "--master-port auto" in str(caught.value)
        assert choose_port("auto") != taken
    chosen = free_port()
    assert port_problem(chosen) is None
    assert choose_port(chosen) == chosen
    with pytest.raises(ConfigError, match="1 to 65535"):
        choose_port(70000)
