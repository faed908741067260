"""A user whom the system does not know: no passwd entry, no HOME (issue 11)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.spec import PROJECT_ROOT

# In a user namespace of its own the process keeps its files and has another number.
AS_NOBODY = ["unshare", "--user", "--map-user=54321"]


def _works() -> bool:
    try:
        done = subprocess.run([*AS_NOBODY, "id", "-u"], capture_output=True, text=True, timeout=60)
    except OSError:
        return False
    return done.stdout == "54321\n"


pytestmark = pytest.mark.skipif(not _works(), reason="no user namespaces here (unshare --map-user)")


def dry_run(place: Path, **env: str) -> subprocess.CompletedProcess[str]:
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ}
    train = [sys.executable, str(PROJECT_ROOT / "train.py")]
    return subprocess.run(
        [*AS_NOBODY, *train, "--dry-run", "--output-dir", str(place)],
        env=keep | {"PYTHONDONTWRITEBYTECODE": "1"} | env,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_one_line_says_what_to_set(tmp_path: Path) -> None:
    done = dry_run(tmp_path)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "RLHF_CACHE" in done.stderr


@pytest.mark.parametrize("variable", ["RLHF_CACHE", "HOME"])
def test_with_a_place_for_caches_it_works(tmp_path: Path, variable: str) -> None:
    done = dry_run(tmp_path, **{variable: str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
