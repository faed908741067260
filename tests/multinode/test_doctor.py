"""`rlhf doctor` and the checks before a run, on two hosts: what is wrong is found in seconds."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.multinode.conftest import Cluster


def doctor(cluster: Cluster, **environ: str) -> Any:
    command = cluster.many("doctor", steps=(1,))
    command.insert(2, "doctor")
    env = {**cluster.hosts.environment(), **environ}
    return cluster.hosts.run(0, command, cwd=cluster.root, env=env, timeout=120)


@pytest.mark.timeout(180)
def test_all_is_well(cluster: Cluster) -> None:
    """Issue 4: a line for each check, the all-reduce over both hosts among them."""
    done = doctor(cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    for host in ("node0", "node1"):
        for what in ("ssh", "this project", "packages", "clock", "GPUs", "free disk"):
            assert f"ok   {host}: {what}" in done.stdout
    assert "ok   node0: port 29500" in done.stdout
    assert "ok   all-reduce: 2 hosts meet" in done.stdout
    assert not list((cluster.root / "doctor").glob(".probe*"))


@pytest.mark.timeout(120)
def test_no_sshd_on_the_far_host(cluster: Cluster) -> None:
    """Issue 4: sshd stopped: exit 3 within seconds, from the doctor's checks before a run."""
    hosts = cluster.hosts
    (pid,) = hosts.run(1, ["cat", "/run/sshd.pid"]).stdout.split()
    hosts.run(1, ["kill", pid])
    began = time.monotonic()
    try:
        env = hosts.environment()
        done = hosts.run(0, cluster.many("nossh"), cwd=cluster.root, env=env, timeout=100)
    finally:
        hosts.run(1, ["/usr/sbin/sshd", "-f", str(hosts.home / "sshd_config")])
    assert time.monotonic() - began < 30
    assert done.returncode == 3
    assert "FAIL node1: ssh" in done.stderr
    assert "Connection refused" in done.stderr
    assert "-> make `ssh -o BatchMode=yes node1 hostname` work" in done.stderr
    assert not (cluster.root / "nossh" / "step1_sft").exists()


@pytest.mark.timeout(120)
def test_several_things_wrong_at_once(cluster: Cluster) -> None:
    """Issue 4: a name that means 127.0.1.1, a busy port, a run directory that is not shared."""
    hosts = cluster.hosts
    names = hosts.home / "debian_hosts"
    names.write_text("127.0.0.1 localhost\n127.0.1.1 node1\n10.77.0.10 node0\n")
    private = cluster.root / "doctor"
    private.mkdir(exist_ok=True)
    busy = hosts.popen(
        0, ["python3", "-c", "import socket,time; s=socket.socket(); s.bind(('',29500));"
            "s.listen(); time.sleep(60)"],
    )  # fmt: skip
    hosts.run(1, ["mount", "--bind", str(names), "/etc/hosts"])
    hosts.run(1, ["mount", "-t", "tmpfs", "tmpfs", str(private)])
    try:
        while hosts.run(0, ["sh", "-c", "ss -ltn | grep -q :29500"]).returncode:
            time.sleep(0.1)
        env = {"GLOO_SOCKET_IFNAME": ""}
        done = doctor(cluster, **env)
    finally:
        hosts.end(0, busy, "s.listen()")
        hosts.run(1, ["umount", "/etc/hosts"])
        hosts.run(1, ["umount", str(private)])
    assert done.returncode == 3
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 3, done.stdout
    assert "what its own name means: 127.0.1.1" in done.stdout
    assert "port 29500: Address already in use" in done.stdout
    assert f"node1: {private}: NOT visible" in done.stdout
