"""Starts one command on every node by ssh and ends them together. Standard library only.

    python fanout.py HOST,HOST COMMAND...

`{node}` in the command is the node's number. The first node whose command fails ends the others;
the exit code is its. Remote processes end by themselves when their ssh is gone and the run's
heartbeat stops (rlhf/lifeline.py).
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
import time
from typing import Any

# A dead link is noticed after 15 s; without, ssh waits for as long as TCP does.
SSH_OPTIONS = [
    "-o", "BatchMode=yes", "-o", "ConnectTimeout=10",
    "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3",
]  # fmt: skip


def start(host: str, number: int, command: list[str]) -> subprocess.Popen[bytes]:
    """The command on one node; its lines come out with the node's name before them."""
    remote = shlex.join([part.replace("{node}", str(number)) for part in command])
    child = subprocess.Popen(
        ["ssh", *SSH_OPTIONS, host, remote],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    threading.Thread(target=relay, args=(host, child.stdout), daemon=True).start()
    return child


def relay(host: str, stream: Any) -> None:
    for line in stream:
        sys.stdout.buffer.write(f"{host}: ".encode() + line)
        sys.stdout.buffer.flush()


def wait(children: dict[str, subprocess.Popen[bytes]]) -> int:
    """0 when all have ended well, else the first bad exit code, at once."""
    running = dict(children)
    while running:
        for host, child in list(running.items()):
            code = child.poll()
            if code is None:
                continue
            del running[host]
            if code != 0:
                print(f"{host}: ended with exit code {code}", flush=True)
                return code if code > 0 else 128 - code
        time.sleep(0.1)
    return 0


def main(argv: list[str]) -> int:
    hosts, command = argv[1].split(","), argv[2:]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    children: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for number, host in enumerate(hosts):
            children[host] = start(host, number, command)
        return wait(children)
    finally:
        for child in children.values():
            if child.poll() is None:
                child.terminate()
        time.sleep(0.2)  # the relays write what has already come


if __name__ == "__main__":
    sys.exit(main(sys.argv))
