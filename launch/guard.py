"""Runs a command and makes sure that nothing of it stays behind. Standard library only.

    python guard.py DRIVER_PID GRACE_SECONDS COMMAND...

The driver starts this in a session of its own. On SIGTERM or SIGINT, and when the driver dies in
any way, the ranks are told to stop: they save a checkpoint. What is left after the grace period is
killed, and so is what is left of a command that has ended by itself. A launcher's workers are found
even where they made sessions of their own (torchrun) or outlived their launcher (deepspeed): as a
child subreaper the guard inherits them.
Exits with the command's code, or 128 + the signal that ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
GUARD, GRACE = "RLHF_GUARD", "RLHF_GRACE"  # rlhf/lifeline.py: a rank ends when this one is gone
LEFTOVERS_SECONDS = 15.0  # for what a command leaves behind: its result is known already
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the process group is all that is known."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """Pids of all processes below `root`, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as stream:
            # "pid (name) state ppid ...": the name may hold spaces and brackets
            parent = int(stream.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    pending = [root]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def signal_all(number: int) -> None:
    """Sends a signal to every process below this one."""
    signal_these(descendants(os.getpid()), number)


def signal_these(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def identity(pid: int) -> str:
    """What tells a process from a later one with the same number: pid, start time, boot.

    Empty where it cannot be known (no /proc), or where there is no such process any more.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            boot = stream.read().strip()
        with open(f"/proc/{pid}/stat", "rb") as stream:
            fields = stream.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == b"Z" else f"{pid} {fields[19].decode()} {boot}"


def ask_to_stop(below: list[int] | None = None) -> None:
    """SIGTERM to the ranks, which save and end; their launchers then end by themselves.

    A launcher that gets the signal too gives its ranks a time of its own to live. Where no rank
    is below this process (they are on other machines, or not started yet), to all.
    """
    below = descendants(os.getpid()) if below is None else below
    signal_these([pid for pid in below if is_rank(pid)] or below, signal.SIGTERM)


def is_rank(pid: int) -> bool:
    """Does the process have what launchers give to the ranks of a job?"""
    return has_variable(pid, "LOCAL_RANK=")


def has_variable(pid: int, beginning: str) -> bool:
    """Was the process started with a variable that begins like this ("NAME=value...")?"""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as stream:
        wanted = beginning.encode()
        return any(entry.startswith(wanted) for entry in stream.read().split(b"\0"))
    return False


def reap(main: int, code: int | None) -> tuple[int | None, bool]:
    """Collects ended children: (the command's exit code if known, are there children left)."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code, False
        if pid == 0:
            return code, True
        if pid == main:
            code = os.waitstatus_to_exitcode(status)


def start(command: list[str], grace: float) -> int:
    """Starts the command with default signals; it is told to end should the guard be killed."""

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS | {signal.SIGCHLD})

    # Launchers pass it on to ranks on this machine. A rank on another one does not find the boot.
    environment = {**os.environ, GUARD: identity(os.getpid()), GRACE: str(grace)}
    return subprocess.Popen(command, env=environment, preexec_fn=in_child).pid


def main(argv: list[str]) -> int:
    driver, grace, command = int(argv[1]), float(argv[2]), argv[3:]
    awaited = STOP_SIGNALS | {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != driver:  # it died before the line above
        return 128 + signal.SIGTERM
    try:
        child = start(command, grace)
    except OSError as error:
        print(f"{command[0]}: cannot be started: {error}", file=sys.stderr)
        return 127
    code: int | None = None
    deadline: float | None = None
    while True:
        code, left = reap(child, code)
        if not left:
            break
        now = time.monotonic()
        if code is not None and deadline is None:  # it ended; what it started must end too
            signal_all(signal.SIGTERM)
            deadline = now + min(grace, LEFTOVERS_SECONDS)
        if deadline is not None and now >= deadline:
            signal_all(signal.SIGKILL)
        wait = 3600.0 if deadline is None else min(0.2, max(0.01, deadline - now))
        received = signal.sigtimedwait(awaited, wait)
        if received is not None and received.si_signo in STOP_SIGNALS:
            if deadline is None:
                ask_to_stop()
            # A second request means: now.
            deadline = time.monotonic() + (grace if deadline is None else 0)
    if code is None:
        return 128 + signal.SIGKILL
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
