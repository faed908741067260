"""Every launcher across two hosts, one step each, for real."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from rlhf.store import RunDir, read_json, verify
from rlhf.track import read_metrics
from tests.multinode.conftest import Cluster

FAST = ["--preflight", "fast"]
OPENMPI = (
    "--allow-run-as-root --map-by node --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0"
)
ACCELERATE_FILES = {
    "multi_cpu": "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 7\n",
    "deepspeed": "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\n",
    "multi_gpu": "distributed_type: MULTI_GPU\ngpu_ids: all\nmain_process_port: 1\n",
}


def check(cluster: Cluster, name: str, done: Any) -> str:
    """Both ranks came to the end, the artifact verifies, nothing is left."""
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    run = RunDir(cluster.root / name)
    assert {path.name for path in run.logs(1).glob("rank*.done.json")} == {
        "rank0.done.json",
        "rank1.done.json",
    }
    assert read_json(run.resolved(1))["world_size"] == 2
    assert [row["train/loss"] for row in read_metrics(run.metrics(1)) if "train/loss" in row]
    verify(run.artifact("sft"), "sft")
    assert cluster.hosts.wait_empty(5) == {}
    return output


def on_first(cluster: Cluster, command: list[str], env: dict[str, str] | None = None) -> Any:
    env = env or cluster.hosts.environment()
    return cluster.hosts.run(0, command, cwd=cluster.root, env=env, timeout=200)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("openmpi", ["--node-launcher", "openmpi", f"--launcher-args={OPENMPI}"]),
        ("torchrun", ["--launcher", "torchrun"]),
    ],
)
def test_over_ssh(cluster: Cluster, name: str, flags: list[str]) -> None:
    """Y4, Y5: mpirun through deepspeed, torchrun with a c10d rendezvous, from one command."""
    check(cluster, name, on_first(cluster, cluster.many(name, *FAST, *flags, steps=(1,))))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ACCELERATE_FILES)
def test_accelerate(cluster: Cluster, kind: str) -> None:
    """Y5: accelerate with a config file of each type; what the file says of processes, ports and
    sharding is set from our settings. One type runs on both hosts, the others on one."""
    path = cluster.root / f"{kind}.yaml"
    head = "compute_environment: LOCAL_MACHINE\n"
    path.write_text(head + ACCELERATE_FILES[kind])
    name, flags = (
        f"accelerate-{kind}",
        ["--launcher", "accelerate", "--accelerate-config", str(path)],
    )
    if kind == "multi_cpu":
        command = cluster.many(name, *FAST, *flags, steps=(1,))
    else:
        command = cluster.command(name, "--num-gpus", "2", *flags, steps=(1,))
    check(cluster, name, on_first(cluster, command))


@pytest.mark.timeout(240)
def test_started_by_hand_on_each_node(cluster: Cluster) -> None:
    """Y4: the same command with --node-rank on each node; the first keeps the records."""
    name = "hand"
    commands = [
        cluster.many(name, "--node-rank", str(rank), "--master-addr", "10.77.0.10", steps=(1,))
        for rank in (0, 1)
    ]
    log = cluster.root / "hand1.out"
    second = cluster.hosts.popen(
        1, commands[1], cwd=cluster.root, env=cluster.hosts.environment(),
        stdout=log.open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        check(cluster, name, on_first(cluster, commands[0]))
        assert second.wait(60) == 0, log.read_text()[-3000:]
    finally:
        cluster.hosts.end(1, second, "train.py")
    step = cluster.root / name / "step1_sft"
    assert {path.name for path in step.glob("command*.sh")} == {"command.sh", "command.node1.sh"}
    assert (step / "logs" / "console.node1.log").is_file()


@pytest.mark.timeout(240)
def test_slurm_batch_script(cluster: Cluster, slurm: dict[str, str]) -> None:
    """Y4, Y6: the file in the run directory is what was submitted; no token is in it or its job."""
    env = {**slurm, "HF_TOKEN": "hf_planted"}
    command = cluster.many("slurm", *FAST, "--launcher", "slurm", steps=(1,))
    done = cluster.hosts.run(0, command, cwd=cluster.root, env=env, timeout=200)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    job = re.search(r"slurm job (\d+): completed", output)
    assert job
    script = cluster.root / "slurm" / "step1_sft" / "job.sbatch"
    assert f"submitted {script}" in output
    assert "hf_planted" not in script.read_text()
    ended = read_json(cluster.root / "slurm" / "step1_sft" / "logs" / "rank1.done.json")
    assert ended["rank"] == 1
    verify(RunDir(cluster.root / "slurm").artifact("sft"), "sft")


@pytest.mark.timeout(240)
def test_slurm_job_that_fails(cluster: Cluster, slurm: dict[str, str]) -> None:
    """Issue 4: the job's end is the command's: a rank's error, its exit code; nothing queued."""
    flags = [*FAST, "--launcher", "slurm", "data.columns.prompt=absent"]
    command = cluster.many("slurm-fails", *flags, steps=(1,))
    done = cluster.hosts.run(0, command, cwd=cluster.root, env=slurm, timeout=200)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert "has no column 'absent'" in done.stderr
    assert cluster.hosts.run(0, ["squeue", "-h"], env=slurm).stdout == ""


@pytest.mark.timeout(240)
def test_deepspeeds_own_slurm(cluster: Cluster, slurm: dict[str, str]) -> None:
    """Y4: `--node-launcher slurm` inside an allocation."""
    inside = cluster.many("srun", *FAST, "--node-launcher", "slurm", steps=(1,))
    command = ["salloc", "--nodes=2", "--ntasks=2", *inside]
    done = cluster.hosts.run(0, command, cwd=cluster.root, env=slurm, timeout=200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    verify(RunDir(cluster.root / "srun").artifact("sft"), "sft")
