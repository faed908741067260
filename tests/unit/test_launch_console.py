"""Neither a run nor its exit code depends on the console (issue 11)."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.console import Console, keep_log
from launch.spec import PROJECT_ROOT

OK = ["--dry-run", "--name", "r"]
BAD = ["--step", "4"]
TRAIN = [sys.executable, str(PROJECT_ROOT / "train.py")]


def shell(tmp_path: Path, command: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`command` is a shell line in which "$@" is train.py with its arguments."""
    argv = ["bash", "-c", command, "bash", *TRAIN, *args, "--output-dir", str(tmp_path)]
    return subprocess.run(
        argv, capture_output=True, text=True, env=os.environ | env, cwd=tmp_path, timeout=240
    )


@pytest.mark.parametrize(
    "command",
    [
        '"$@" >&-',
        '"$@" >&- 2>&- <&-',
        '"$@" >/dev/full',
        '"$@" >/dev/full 2>/dev/full',
        'set -o pipefail; "$@" | true',
        'set -o pipefail; "$@" 2>&1 | true',
    ],
)
@pytest.mark.parametrize(("args", "code"), [(OK, 0), (BAD, 2)])
def test_exit_codes_do_not_depend_on_the_console(
    tmp_path: Path, command: str, args: list[str], code: int
) -> None:
    done = shell(tmp_path, command, *args)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_encoding_lacks_is_escaped(tmp_path: Path, encoding: str) -> None:
    done = shell(tmp_path, '"$@"', *OK, "step1.model.name=tiny:llama", "data.prompt_format=№ {q}",
                 "data.path=[№.jsonl]", "--print-config", PYTHONIOENCODING=encoding)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\\u2116" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_steps_has_its_exit_code(tmp_path: Path, number: int) -> None:
    """Even though nobody reads what the driver says."""
    code = (
        "import sys, time, train\n"
        "def run(argv):\n"
        "    print('here', flush=True)\n"
        "    while True: time.sleep(0.1)\n"
        "train.run = run\n"
        "sys.exit(train.main([]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=PROJECT_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as driver:
        assert driver.stdout is not None
        assert driver.stderr is not None
        assert driver.stdout.readline() == b"here\n"
        driver.stdout.close()
        driver.stderr.close()
        driver.send_signal(number)
        assert driver.wait(60) == 128 + number


def test_an_ignored_hang_up_stays_ignored(tmp_path: Path) -> None:
    """`nohup python train.py`."""
    done = shell(tmp_path, 'trap "" HUP; "$@"', *OK)
    assert done.returncode == 0


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_what_a_console_does_not_take_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Console(Broken()))
    keep_log(tmp_path / "driver.log")
    print("first", flush=True)
    print("second ± ü", flush=True)
    assert (tmp_path / "driver.log").read_text(encoding="utf-8") == "first\nsecond ± ü\n"


def test_a_log_that_cannot_be_written_is_no_lost_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Console(shown))
    (tmp_path / "driver.log").symlink_to(tmp_path / "other")
    keep_log(tmp_path / "driver.log")
    print("seen")
    assert shown.getvalue() == "seen\n"
    assert not (tmp_path / "other").exists()
