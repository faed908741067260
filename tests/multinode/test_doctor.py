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
@pytest.mark.parametrize("act", ["doctor", "run"])
def test_one_host_under_two_names(cluster: Cluster, act: str) -> None:
    """Issue 11: refused by its identity, before anything starts; both names and the remedy."""
    hosts = cluster.hosts
    known = hosts.home / "hosts"
    before = known.read_text()
    with known.open("a") as stream:  # the same file as the hosts' /etc/hosts
        stream.write(f"{hosts.hosts[1].address} gpu7\n")
    file = hosts.home / "twice"
    file.write_text("node1 slots=1\ngpu7 slots=1\n")
    nodes = ["--deployment-type", "multi_node", "--hostfile", str(file)]
    command = cluster.command("twice", *nodes, steps=(1,))
    if act == "doctor":
        command.insert(2, "doctor")
    try:
        done = hosts.run(0, command, cwd=cluster.root, env=hosts.environment(), timeout=100)
    finally:
        known.write_text(before)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert (
        "FAIL each host a machine of its own: node1 and gpu7 are one machine (node1) (needed: no "
        "machine under two names) -> keep one name in the hostfile" in said
    )
    assert not (cluster.root / "twice" / "step1_sft").exists()


@pytest.mark.timeout(120)
def test_several_things_wrong_at_once(cluster: Cluster) -> None:
    """Issue 4: a name that means 127.0.1.1, a busy port, a run directory that is not shared."""
    hosts = cluster.hosts
    names = hosts.home / "debian_hosts"
    names.write_text("127.0.0.1 localhost\n127.0.1.1 node1\n10.77.0.10 node0\n")
    private = cluster.root / "doctor"
    private.mkdir(exist_ok=True)
    # Reuse: the all-reduce of an earlier test has left the port in TIME_WAIT.
    listen = (
        "import socket, time; s = socket.socket();"
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1);"
        "s.bind(('', 29500)); s.listen(); time.sleep(60)"
    )
    busy = hosts.popen(0, ["python3", "-c", listen])
    hosts.run(1, ["mount", "--bind", str(names), "/etc/hosts"])
    hosts.run(1, ["mount", "-t", "tmpfs", "tmpfs", str(private)])
    try:
        deadline = time.monotonic() + 20
        while hosts.run(0, ["sh", "-c", "ss -ltn | grep -q :29500"]).returncode:
            assert busy.poll() is None
            assert time.monotonic() < deadline
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
