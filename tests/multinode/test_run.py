"""All three steps across two hosts, as a user starts them, against the same on one host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.store import RunDir, read_json, verify
from rlhf.track import read_metrics
from tests.multinode.conftest import Cluster

# What must not depend on where the ranks are; times and memory may.
COMPARED = {
    1: ("train/loss", "train/grad_norm", "train/tokens", "eval/perplexity"),
    2: ("train/loss", "train/accuracy", "train/grad_norm", "eval/accuracy"),
    3: ("score", "kl", "policy_loss", "value_loss", "answers"),
}


@pytest.fixture(scope="module")
def alone(cluster: Cluster) -> RunDir:
    """Two processes on one host, ZeRO-2."""
    flags = ["--num-gpus", "2", "--actor-zero-stage", "2", "--reward-zero-stage", "2"]
    run(cluster, cluster.command("alone", *flags))
    return RunDir(cluster.root / "alone")


def run(cluster: Cluster, command: list[str]) -> str:
    env = cluster.hosts.environment()
    done = cluster.hosts.run(0, command, cwd=cluster.root, env=env, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def figures(directory: RunDir, step: int) -> list[dict[str, Any]]:
    rows = [
        {name: row[name] for name in COMPARED[step] if name in row}
        for row in read_metrics(directory.metrics(step))
    ]
    return [row for row in rows if row]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_hosts_give_the_numbers_of_one(cluster: Cluster, alone: RunDir, stage: int) -> None:
    """Issue 4: one command, pdsh, ZeRO-2 and ZeRO-3: losses, artifacts and files of one host."""
    name = f"zero{stage}"
    flags = ["--actor-zero-stage", str(stage), "--reward-zero-stage", str(stage)]
    out = run(cluster, cluster.many(name, *flags))
    assert "VERDICT" in out
    assert cluster.hosts.wait_empty(5) == {}
    many = RunDir(cluster.root / name)
    for step, kind in ((1, "sft"), (2, "reward"), (3, "ppo")):
        hosts = {
            json.loads(path.read_text())["host"] for path in many.logs(step).glob("rank?.done.json")
        }
        assert hosts == {"node0", "node1"}
        here, there = figures(alone, step), figures(many, step)
        assert len(here) == len(there) > 1
        for mine, theirs in zip(here, there, strict=True):
            assert theirs == pytest.approx(mine, rel=2e-4, abs=2e-5)
        verify(many.artifact(kind), kind)
        assert files(many.artifact(kind)) == files(alone.artifact(kind))
    stages = read_json(many.resolved(3))["config"]["step3"]["actor"]["engine"]["zero_stage"]
    assert stages == stage


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
