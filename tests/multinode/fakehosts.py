"""Two hosts on one machine, for tests: namespaces made here, ended here, by the ids kept here.

A host is a network namespace with an address of its own in a bridge, and its own pid, mount, UTS
and IPC namespaces: it sees its own processes, /dev/shm, /run, /etc/hosts, host name and sshd.
Killing its first process ends all of it. The bridge lives in a third namespace; the machine's own
network is not touched. Everything else (project, run directory) is shared, as over NFS.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NETWORK = "10.77.0"
TOOLS = ("ip", "setpriv", "nsenter", "unshare", "ssh", "ssh-keygen", "/usr/sbin/sshd", "pdsh")

INIT = """\
set -e
mount -t tmpfs -o size=512m tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
hostname {name}
mount --bind {home}/hosts /etc/hosts
mount --bind {home}/ssh_config /etc/ssh/ssh_config
mkdir -p {local}
mount -t tmpfs -o size=512m tmpfs {local}
ip link set lo up
/usr/sbin/sshd -f {home}/sshd_config -E {home}/{name}.sshd.log
touch {home}/{name}.up
exec sleep infinity
"""

SSHD = """\
Port 22
HostKey {home}/host_key
AuthorizedKeysFile {home}/key.pub
PidFile /run/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
AllowUsers root
"""

SSH = """\
Host *
  IdentityFile {home}/key
  IdentitiesOnly yes
  UserKnownHostsFile {home}/known_hosts
  StrictHostKeyChecking accept-new
  BatchMode yes
  ConnectTimeout 5
  LogLevel ERROR
"""


def missing() -> str:
    """Why fake hosts cannot be made here; empty if they can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (see .ci/run for the Debian packages)"
    probe = ["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "--ipc", "true"]
    done = subprocess.run(probe, capture_output=True, text=True)
    return f"namespaces cannot be made: {done.stderr.strip()}" if done.returncode else ""


@dataclass
class Host:
    """One fake host. `init` is its first process, seen from outside."""

    name: str
    address: str
    netns: str
    veth: str
    init: int = 0
    runner: subprocess.Popen[bytes] | None = None

    def enter(self) -> list[str]:
        """The prefix that runs a command inside."""
        wanted = ("--net", "--pid", "--mount", "--uts", "--ipc")
        return ["nsenter", "--target", str(self.init), *wanted]


@dataclass
class FakeHosts:
    """The hosts with what they share. Make with `fake_hosts`."""

    home: Path
    bridge: str
    hosts: list[Host] = field(default_factory=list)

    @property
    def local(self) -> Path:
        """A directory that is on a small disk of its own on each host."""
        return self.home / "local"

    def hostfile(self, slots: int = 1) -> Path:
        path = self.home / f"hostfile{slots}"
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self.hosts))
        return path

    def environment(self, **more: str) -> dict[str, str]:
        """What a user's shell on a host would have; nothing of the test's own ranks."""
        dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {k: v for k, v in os.environ.items() if k not in dropped}
        return {**kept, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", **more}

    def popen(self, node: int, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.hosts[node].enter(), *argv], text=True, **options)

    def run(
        self, node: int, argv: Sequence[str], **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """A command on a host, to its end."""
        settings = {"capture_output": True, "text": True, "timeout": 60, **options}
        return subprocess.run([*self.hosts[node].enter(), *argv], **settings)

    def processes(self, node: int) -> dict[int, str]:
        """pid inside the host -> command line, of all that runs there but its own services."""
        script = (
            "for p in /proc/[0-9]*; do printf '%s ' ${p#/proc/};"
            " tr '\\0' ' ' <$p/cmdline 2>/dev/null; echo; done"
        )
        found: dict[int, str] = {}
        for line in self.run(node, ["sh", "-c", script]).stdout.splitlines():
            pid, _, command = line.partition(" ")
            own = ("sleep infinity", "sshd", "/usr/sbin/sshd", "sh -c for p in")
            if pid.isdigit() and command.strip() and not command.startswith(own):
                found[int(pid)] = command.strip()
        return {pid: text for pid, text in found.items() if not text.startswith("nsenter")}

    def pids(self, node: int, *parts: str) -> list[int]:
        """Pids inside the host of processes whose command line has all parts."""
        found = self.processes(node)
        return [pid for pid, text in found.items() if all(part in text for part in parts)]

    def kill(self, node: int, pid: int, number: int = signal.SIGKILL) -> None:
        self.run(node, ["kill", f"-{int(number)}", str(pid)])

    def end(self, node: int, started: subprocess.Popen[str], *parts: str) -> None:
        """Kills what `popen` started: inside, too, where nsenter has a child."""
        for pid in self.pids(node, *parts):
            self.kill(node, pid)
        started.kill()
        started.wait()

    def link(self, node: int, state: str) -> None:
        """`down` cuts the host's cable at the bridge, `up` plugs it in."""
        _ip("-n", self.bridge, "link", "set", self.hosts[node].veth, state)

    def wait_empty(self, seconds: float) -> dict[str, dict[int, str]]:
        """What still runs on the hosts after at most so long; empty is good."""
        deadline = time.monotonic() + seconds
        while True:
            left = {h.name: p for i, h in enumerate(self.hosts) if (p := self.processes(i))}
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.3)


@contextlib.contextmanager
def fake_hosts(home: Path, count: int = 2) -> Iterator[FakeHosts]:
    """Makes the hosts and takes them away again, whatever happened in between."""
    tag = f"rlhf{os.getpid()}"
    made = FakeHosts(home, f"{tag}br")
    for number in range(count):
        name = f"node{number}"
        made.hosts.append(Host(name, f"{NETWORK}.1{number}", f"{tag}n{number}", f"v{number}"))
    _remove_abandoned()
    try:
        _write_files(made)
        _connect(made)
        for host in made.hosts:
            _boot(made, host)
        yield made
    finally:
        for host in made.hosts:
            if host.runner is not None:
                host.runner.kill()  # --kill-child: the host's first process, and so all of it, ends
                host.runner.wait()
        for name in (*(host.netns for host in made.hosts), made.bridge):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _write_files(made: FakeHosts) -> None:
    home = made.home
    made.local.mkdir()
    for name in ("key", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
        subprocess.run(command, check=True)
    lines = [f"{host.address} {host.name}" for host in made.hosts]
    (home / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    (home / "sshd_config").write_text(SSHD.format(home=home))
    (home / "ssh_config").write_text(SSH.format(home=home))


def _connect(made: FakeHosts) -> None:
    _ip("netns", "add", made.bridge)
    _ip("-n", made.bridge, "link", "add", "br0", "type", "bridge")
    _ip("-n", made.bridge, "link", "set", "br0", "up")
    for host in made.hosts:
        _ip("netns", "add", host.netns)
        pair = ["type", "veth", "peer", "name", "eth0", "netns", host.netns]
        _ip("-n", made.bridge, "link", "add", host.veth, *pair)
        _ip("-n", made.bridge, "link", "set", host.veth, "master", "br0", "up")
        _ip("-n", host.netns, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.netns, "link", "set", "eth0", "up")


def _boot(made: FakeHosts, host: Host) -> None:
    script = INIT.format(name=host.name, home=made.home, local=made.local)
    # nsenter and not `ip netns exec`, which remounts /sys: slurmd would find no cgroup.
    command = [
        "setpriv", "--pdeathsig", "KILL",  # a killed test run takes its hosts along
        "nsenter", f"--net=/run/netns/{host.netns}",
        "unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--mount-proc",
        "sh", "-c", script,
    ]  # fmt: skip
    log = (made.home / f"{host.name}.boot.log").open("wb")
    host.runner = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    ready = made.home / f"{host.name}.up"
    deadline = time.monotonic() + 20
    while not ready.exists():
        if host.runner.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{host.name} did not start: {Path(log.name).read_text()}")
        time.sleep(0.02)
    host.init = int(_children(host.runner.pid)[0])


def _remove_abandoned() -> None:
    """Names of networks whose test run was killed; they are empty."""
    for line in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout.splitlines():
        found = re.fullmatch(r"rlhf(\d+)(br|n\d+)", line.split()[0])
        if found and not Path(f"/proc/{found[1]}").exists():
            subprocess.run(["ip", "netns", "del", found[0]], capture_output=True)


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
