"""What is kept between runs, killed while it is written: it is never used half-written.

The child dies at its n-th audit event (open, mkdir, rename, remove, ...), for every n, and in the
middle of the write that makes a file longer than n bytes, for many n.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HARNESS = """
import os, resource, signal, sys
from pathlib import Path
place = Path(sys.argv[1])
{setup}

def child(prepare):
    pid = os.fork()
    if pid == 0:
        prepare()
        try:
            write("new")
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def at_event(n):
    seen = [0]
    def hook(event, arguments):
        seen[0] += 1
        if seen[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def at_size(n):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))

def check():
    now = read()
    assert now in ("old", "new", None), now
    assert now is not None or {may_be_absent}, "what was there is gone"

killed = 0
for n in range(1, 5000):
    write("old")
    assert read() == "old"
    code = child(lambda: at_event(n))
    check()
    if code == 0:
        assert read() == "new"
        break
    assert code == -signal.SIGKILL, code
    killed += 1
assert killed > {fewest}, killed
cut = 0
for n in [0, 1, 2, 3, 5, 8, *range(10, 2500, {stride}), 10_000]:
    write("old")
    code = child(lambda: at_size(n))
    check()
    assert code in (0, -signal.SIGXFSZ), code
    cut += code != 0
assert cut > 5, cut
write("old"); write("new")
assert read() == "new"
print("killed", killed, "cut", cut)
"""
CACHE = """
import pyarrow as pa
from rlhf.data import cache
SCHEMA = pa.schema({"x": pa.int32(), "text": pa.string()})

def write(version):
    rows = {"x": list(range(50)), "text": [version] * 50}
    cache.store(place, "key", rows, SCHEMA, {"fingerprint": version})

def read():
    found = cache.load(place, "key")
    if found is None:
        return None
    dataset, info = found
    assert list(dataset["text"]) == [info["fingerprint"]] * 50, "mixed"
    return info["fingerprint"]
"""
BASE = """
from rlhf.store.publishing import _is_whole, make_once

def write(version):
    def fill(directory):
        (directory / "part").mkdir()
        (directory / "part" / "model.safetensors").write_bytes(version.encode() * 600)
        (directory / "config.json").write_text(version)
    make_once(place / "base", fill, made_from=version, origin={})

def read():
    versions = [v for v in ("old", "new") if _is_whole(place / "base", v)]
    if not versions:
        return None
    data = (place / "base/part/model.safetensors").read_bytes()
    assert data == versions[0].encode() * 600
    return versions[0]
"""
SCRIPT = """
from launch.records import write_script

def write(version):
    write_script(place / "command.sh", version)

def read():
    lines = (place / "command.sh").read_text().splitlines()
    assert os.access(place / "command.sh", os.X_OK)
    return lines[2] if len(lines) == 3 else "part"
"""


@pytest.mark.parametrize(
    ("setup", "may_be_absent", "fewest", "stride"),
    [(CACHE, True, 10, 300), (BASE, False, 30, 300), (SCRIPT, False, 5, 50)],
    ids=["tokenised rows", "base model", "command.sh"],
)
def test_killed_while_it_is_written(
    tmp_path: Path, setup: str, may_be_absent: bool, fewest: int, stride: int
) -> None:
    """Issue 5, atomicity: whole or not at all. A cache may be gone, and is then made again."""
    code = HARNESS.format(setup=setup, may_be_absent=may_be_absent, fewest=fewest, stride=stride)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
