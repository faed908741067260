"""Real Slurm ends a job before its time: the ranks save, the job comes back, the run goes on."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.store import RunDir, verify
from rlhf.store.checkpoints import checkpoints
from rlhf.track import read_metrics
from tests.multinode.conftest import Cluster
from tests.soak import digests, figures

LONG = ["step1.train.epochs=60", "step1.train.max_steps=700", "launch.grace_seconds=30"]
FLAGS = ["--preflight", "fast", "--launcher", "slurm", *LONG]


def start(cluster: Cluster, slurm: dict[str, str], name: str, *flags: str) -> subprocess.Popen[str]:
    command = cluster.many(name, *FLAGS, *flags, steps=(1,))
    return cluster.hosts.popen(
        0, command, cwd=cluster.root, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def tool(cluster: Cluster, slurm: dict[str, str], *command: str) -> str:
    return str(cluster.hosts.run(0, command, env=slurm).stdout)


def job_of(cluster: Cluster, slurm: dict[str, str], name: str) -> str:
    """The job that trains in the run of this name, once it has made some steps."""
    step = RunDir(cluster.root / name)
    wait_for(lambda: len(read_metrics(step.metrics(1))) > 8)
    (job,) = tool(cluster, slurm, "squeue", "-h", "-o", "%i", "--states=running").split()
    return job


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def let_it_begin(cluster: Cluster, slurm: dict[str, str], job: str) -> None:
    """Slurm lets a job that was requeued wait for two minutes."""
    wait_for(lambda: "JobState=PENDING" in tool(cluster, slurm, "scontrol", "show", "job", job))
    wait_for(
        lambda: (
            "Restarts=1" in tool(cluster, slurm, "scontrol", "show", "job", job)
            and not tool(cluster, slurm, "squeue", "-h", "-t", "completing")
        )
    )
    # Credentials are revoked by the second: one of the same second would be taken for the old one.
    time.sleep(2)
    tool(cluster, slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.fixture(scope="module")
def whole(cluster: Cluster, slurm: dict[str, str]) -> Path:
    """The same step, left alone."""
    start(cluster, slurm, "alone").communicate(timeout=200)
    verify(RunDir(cluster.root / "alone").artifact("sft"), "sft")
    return cluster.root / "alone" / "step1_sft"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", ["the time limit", "a preemption"])
def test_the_job_comes_back(cluster: Cluster, slurm: dict[str, str], whole: Path, how: str) -> None:
    """USR1 to the batch script, as `--signal=B:USR1@120` has it sent; and a job of a higher
    partition, for which Slurm tells the ranks to go. Weights and figures are those of an untouched
    run, and nothing of the first attempt is overwritten."""
    name = how.replace(" ", "-")
    driver = start(cluster, slurm, name)
    step = cluster.root / name / "step1_sft"
    job = job_of(cluster, slurm, name)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null"]
    if how == "the time limit":
        tool(cluster, slurm, "scancel", "--batch", "--signal=USR1", job)
    else:
        tool(cluster, slurm, *urgent, "--wrap=sleep 1")
    let_it_begin(cluster, slurm, job)
    assert checkpoints(step / "resume")
    first = (step / "logs" / f"slurm-{job}.attempt0.out").read_bytes()
    out, _ = driver.communicate(timeout=200)
    assert driver.returncode == 0, out[-4000:]
    assert f"slurm job {job}: requeued; attempt 1 is to come" in out
    assert f"slurm job {job}: completed" in out
    assert re.search(r"going on from step-\d+ \(\d+ done\)", out)
    assert digests(step) == digests(whole)
    assert figures(step) == figures(whole)
    assert (step / "logs" / f"slurm-{job}.attempt0.out").read_bytes() == first
    assert (step / "logs" / f"slurm-{job}.attempt1.out").exists()
    assert "stopped by a signal after" in (step / "logs" / "rank0.log").read_text()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("who", ["the driver", "scancel"])
def test_who_wants_it_to_end_does_not_see_it_come_back(
    cluster: Cluster, slurm: dict[str, str], who: str
) -> None:
    name = who.replace(" ", "-")
    driver = start(cluster, slurm, name)
    job = job_of(cluster, slurm, name)
    if who == "scancel":
        tool(cluster, slurm, "scancel", job)
    else:
        for pid in cluster.hosts.pids(0, "train.py", name):
            cluster.hosts.kill(0, pid, signal.SIGTERM)
    out, _ = driver.communicate(timeout=120)
    assert driver.returncode == (143 if who == "the driver" else 1), out[-3000:]
    time.sleep(3)
    assert tool(cluster, slurm, "squeue", "-h") == ""
    assert "requeued" not in out


@pytest.mark.timeout(300)
def test_a_driver_inside_the_job(cluster: Cluster, slurm: dict[str, str]) -> None:
    """`python train.py` as the batch script's program: told by USR1 it saves, and requeues the job
    that it runs in; the next attempt goes on."""
    name, place = "inside", cluster.root / "inside"
    command = cluster.command(name, *LONG, steps=(1,))
    script = cluster.root / "inside.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --requeue --open-mode=append --signal=B:USR1@120\n"
        f"#SBATCH --output={cluster.root}/inside.out\n"
        "exec " + " ".join(f"'{word}'" for word in command) + "\n"
    )
    tool(cluster, slurm, "sbatch", "--export=ALL", str(script))
    job = job_of(cluster, slurm, name)
    tool(cluster, slurm, "scancel", "--batch", "--signal=USR1", job)
    let_it_begin(cluster, slurm, job)
    assert checkpoints(place / "step1_sft" / "resume")
    ended = lambda: "JobState=COMPLETED" in tool(cluster, slurm, "scontrol", "show", "job", job)
    wait_for(ended, 200)
    told = (cluster.root / "inside.out").read_text()
    assert f"slurm job {job}: requeued; its next attempt goes on from there" in told
    assert "going on from step-" in told
    verify(RunDir(place).artifact("sft"), "sft")
