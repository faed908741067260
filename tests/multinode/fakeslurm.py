"""A Slurm of two nodes inside one fake host: munged, slurmctld and two slurmd on its loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.multinode.fakehosts import FakeHosts

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONF = """\
ClusterName=fake
SlurmUser=root
SlurmdUser=root
SlurmctldHost=node0(127.0.0.1)
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket={home}/munge/munge.sock
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/linear
SchedulerType=sched/backfill
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
NodeName=node0 NodeHostname=node0 NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=8000
NodeName=node1 NodeHostname=node0 NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=8000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=node0,node1 Default=YES State=UP OverSubscribe=FORCE:2 GraceTime=40
PartitionName=urgent Nodes=node0,node1 State=UP PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str:
    path = f"{os.environ['PATH']}:/usr/sbin"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    return f"not installed: {', '.join(absent)} (see .ci/run)" if absent else ""


@contextlib.contextmanager
def slurm(hosts: FakeHosts) -> Iterator[dict[str, str]]:
    """Starts it on the first host; yields the variables by which its commands find it."""
    home = hosts.home / "slurm"
    for folder in (
        home,
        home / "munge",
        home / "state",
        home / "spool.node0",
        home / "spool.node1",
    ):
        folder.mkdir(mode=0o755)
    (home / "slurm.conf").write_text(CONF.format(home=home))
    key = home / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    env = hosts.environment(
        SLURM_CONF=str(home / "slurm.conf"), PATH=f"{os.environ['PATH']}:/usr/sbin"
    )
    munge = home / "munge"
    commands = [
        ["munged", "--force", f"--key-file={key}", f"--socket={munge}/munge.sock",
         f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"],
        ["slurmctld", "-f", str(home / "slurm.conf")],
        ["slurmd", "-f", str(home / "slurm.conf"), "-N", "node0"],
        ["slurmd", "-f", str(home / "slurm.conf"), "-N", "node1"],
    ]  # fmt: skip
    try:
        for command in commands:
            done = hosts.run(0, command, env=env)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
        deadline = time.monotonic() + 20
        while True:
            states = hosts.run(
                0, ["sinfo", "-h", "-N", "-p", "all", "-o", "%T"], env=env
            ).stdout.split()
            if states == ["idle", "idle"]:
                break
            assert time.monotonic() < deadline, (states, logs(home))
            time.sleep(0.2)
        yield env
    finally:
        for name in ("slurmd.node1.pid", "slurmd.node0.pid", "slurmctld.pid", "munge/pid"):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                # The file has the pid as the host sees it.
                hosts.run(0, ["kill", (home / name).read_text().strip()])


def logs(home: Path) -> str:
    return "\n".join(path.read_text()[-1500:] for path in home.glob("*.log"))
