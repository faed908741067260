"""What a host says of itself. Sent to its Python by ssh; standard library only; prints JSON.

Input: JSON on the command line (`question` in launch/hostcheck.py). It writes one small file in the
run directory, which shows that it can, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path


def versions(names):
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def digest(root, parts):
    """Of the project's Python files: None if there is no project."""
    root, total = Path(root), hashlib.sha256()
    files = [file for part in parts for file in sorted(root.glob(part))]
    if not files:
        return None
    for file in files:
        total.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def shared(directory, mark, host):
    """(is the driver's mark here, why nothing can be written here or "")."""
    place = Path(directory)
    seen = (place / mark).is_file()
    try:
        (place / f"{mark}.{host}").write_text(host)
        return seen, ""
    except OSError as error:
        return seen, str(error)


def free_bytes(path):
    place = Path(path).expanduser()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def gpus():
    """MiB of each GPU's memory."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    return [int(line) for line in done.stdout.split() if line.isdigit()]


def ram():
    """Bytes that processes there may use in all; None: not Linux, so not known."""
    found = []
    for place, read in (
        ("/proc/meminfo", lambda text: int(text.split("MemTotal:")[1].split()[0]) * 1024),
        ("/sys/fs/cgroup/memory.max", int),
    ):
        try:
            found.append(read(Path(place).read_text()))
        except (OSError, ValueError, IndexError):  # `max`: no limit
            continue
    return min(found) if found else None


def port_problem(port):
    """Why nothing could listen on the port; "" if something could."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            return ""
        except OSError as error:
            return os.strerror(error.errno or 0)


def machine():
    """What tells this machine, or container, from any other: its boot (or its id), its network and
    its processes. None: it cannot be known."""
    known = None
    for place in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        try:
            known = known or Path(place).read_text().strip()
        except OSError:
            continue
    if not known:
        return None
    spaces = []
    for name in ("net", "pid"):
        try:
            spaces.append(os.readlink(f"/proc/self/ns/{name}"))
        except OSError:
            spaces.append("")
    return [known, *spaces]


def own_address():
    """What this host's own name means to it."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError as error:
        return f"unknown: {error}"


def main(asked):
    seen, trouble = shared(asked["run_dir"], asked["mark"], asked["host"])
    return {
        "time": time.time(),
        "hostname": socket.gethostname(),
        "machine": machine(),
        "address": own_address(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": versions(asked["packages"]),
        "project": digest(asked["root"], asked["parts"]),
        "sees_mark": seen,
        "write_problem": trouble,
        "free": {path: free_bytes(path) for path in asked["disks"]},
        "gpus": gpus(),
        "ram": ram(),
        "port_problem": port_problem(asked["port"]),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
