"""The driver with a hub that is not there: it says so within seconds, before any step starts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.hub import check_hub
from tests.hubclient import ROOT, client_env, files_with

TOKEN = "hf_planted_in_a_test"
HUB_RUN = ["--actor-model", "org/tiny", "--data-path", "org/pairs"]


def drive(
    tmp: Path, *arguments: str, endpoint: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`python train.py` from another directory, with HF_ENDPOINT as given."""
    env = client_env(tmp, endpoint, HF_TOKEN=TOKEN)
    del env["HF_HUB_DISABLE_XET"]  # the driver is to set it
    return subprocess.run(
        [sys.executable, ROOT / "train.py", "--output-dir", tmp / "out", *arguments],
        env=env,
        cwd=tmp,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_unreachable_endpoint_fails_in_seconds(tmp_path: Path, how: str) -> None:
    """C4: nothing listens there; exit code 3, what is missing, and what to do about it."""
    address = "http://127.0.0.1:9"
    flag = ["--hf-endpoint", address] if how == "flag" else []
    began = time.monotonic()
    done = drive(tmp_path, *HUB_RUN, *flag, endpoint=None if flag else f"{address}/")
    assert time.monotonic() - began < 10  # 1 s; the clients alone take 24 s for each file
    assert done.returncode == 3
    for part in ("org/tiny", "org/pairs", f"{address} ", "--hf-endpoint", "local directory"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert files_with(tmp_path / "out", TOKEN) == []


def test_silent_endpoint_fails_in_seconds(tmp_path: Path) -> None:
    """C4: a port that takes connections and never answers is no reason to wait."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        done = drive(tmp_path, *HUB_RUN, "--hf-endpoint", address)
    assert time.monotonic() - began < 15
    assert done.returncode == 3
    assert address in done.stderr


@pytest.mark.parametrize("endpoint", ["ftp://127.0.0.1", "127.0.0.1:8080", "http:///x"])
def test_what_is_no_address_is_bad_usage(tmp_path: Path, endpoint: str) -> None:
    """C4: exit code 2, with the value and an example."""
    done = drive(tmp_path, *HUB_RUN, "--dry-run", "--hf-endpoint", endpoint)
    assert done.returncode == 2
    assert repr(endpoint) in done.stderr
    assert "https://" in done.stderr


def test_a_password_in_the_endpoint_is_refused_and_not_shown(tmp_path: Path) -> None:
    """C4, Y6: it would be written to the run's files."""
    address = "https://user:sesame@host.example"
    done = drive(tmp_path, *HUB_RUN, "--dry-run", "--hf-endpoint", address)
    assert done.returncode == 2
    assert "sesame" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variable", "flag", "expected"),
    [
        (None, None, None),
        ("", None, None),
        ("http://variable:1/", None, "http://variable:1"),
        ("http://variable:1/", "http://flag:2//", "http://flag:2"),
        ("", "http://flag:2/", "http://flag:2"),
        ("http://variable:1", "", None),
    ],
)
def test_which_endpoint_the_processes_get(
    tmp_path: Path, variable: str | None, flag: str | None, expected: str | None
) -> None:
    """C4: the flag before the variable, both normalised; an empty one is none; a mirror: no xet."""
    arguments = ["--hf-endpoint", flag] if flag is not None else []
    done = drive(tmp_path, *HUB_RUN, *arguments, "--dry-run", "--json", endpoint=variable)
    assert done.returncode == 3, done.stderr  # no hub is within reach of a test
    steps = json.loads(done.stdout)["steps"]
    assert len(steps) == 3
    for step in steps:
        assert step["env"].get("HF_ENDPOINT") == expected
        assert step["env"].get("HF_HUB_DISABLE_XET") == ("1" if expected else None)
        assert ("HF_ENDPOINT" in step["unset"]) == (expected is None and variable is not None)


@pytest.mark.parametrize("path", ["org/pairs", "org/pairs:default", "org/pairs@v1"])
def test_every_form_of_a_hub_data_set_is_checked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """C4, C10: configuration and revision in a data path do not hide that it needs the hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    offline, (check,) = check_hub([], [path], "http://127.0.0.1:9", False)
    assert not offline
    assert (check.what, check.state) == ("hub: org/pairs", "FAIL")
    assert "http://127.0.0.1:9 cannot give it" in check.found
