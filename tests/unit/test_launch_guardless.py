"""The guard itself is killed: nothing that it guarded lives on, whoever else is left."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from launch import guard
from launch.failure import explain
from launch.spec import PROJECT_ROOT, LaunchSpec
from launch.supervise import Outcome, supervise
from rlhf import lifeline
from rlhf.stages import SFT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# A launcher that ignores SIGTERM, as deepspeed's in effect does, and two ranks that need a moment.
LAUNCHER = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank = '''
import os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
name = os.environ["LOCAL_RANK"]
def stop(number, frame):
    pathlib.Path("saved" + name).touch()
    os._exit(143)
signal.signal(signal.SIGTERM, {handler})
from rlhf.lifeline import Lifeline
line = Lifeline(pathlib.Path("."), int(name), os.environ)
line.start()
pathlib.Path("pid" + name).write_text(str(os.getpid()) + "\\\\n")
time.sleep(600)
'''
ranks = [
    subprocess.Popen(
        [sys.executable, "-c", rank], env=os.environ | {{"LOCAL_RANK": str(i)}},
        start_new_session=True,
    )
    for i in range(2)
]
for one in ranks:
    one.wait()
"""


def wait_for(condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def pid_of(path: Path) -> int:
    text = path.read_text() if path.exists() else ""
    return int(text) if text.endswith("\n") else 0


def gone(pid: int) -> bool:
    return not guard.identity(pid)


def launcher(handler: str) -> str:
    return textwrap.dedent(LAUNCHER.format(root=str(PROJECT_ROOT), handler=handler))


def guard_of(rank: int) -> int:
    entries = Path(f"/proc/{rank}/environ").read_bytes().split(b"\0")
    found = next(e for e in entries if e.startswith(b"RLHF_GUARD="))
    return int(found.partition(b"=")[2].split()[0])


def supervised(tmp_path: Path, handler: str, grace: float) -> tuple[Outcome, list[int], float]:
    """Runs the launcher, kills its guard; (the outcome, the ranks' pids, seconds it took)."""
    spec = LaunchSpec([sys.executable, "-c", launcher(handler)], {}, str(tmp_path), [])
    killed: list[int] = []
    began = [0.0]

    def kill() -> None:
        killed.extend(wait_for(lambda i=i: pid_of(tmp_path / f"pid{i}")) for i in range(2))
        began[0] = time.monotonic()
        os.kill(guard_of(killed[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = supervise(spec, tmp_path / "log", grace=grace, console=io.BytesIO())
    killer.join()
    return outcome, killed, time.monotonic() - began[0]


def test_ranks_save_and_end_when_their_guard_is_killed(tmp_path: Path) -> None:
    outcome, ranks, _ = supervised(tmp_path, "stop", grace=30.0)
    assert all(gone(pid) for pid in ranks)
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()
    assert outcome.code == -signal.SIGKILL
    assert not outcome.interrupted
    said = str(explain(SFT, outcome, tmp_path))
    assert "launch/guard.py) was killed from outside" in said
    assert "memory" not in said


def test_ranks_that_do_not_listen_are_killed(tmp_path: Path) -> None:
    _, ranks, seconds = supervised(tmp_path, "signal.SIG_IGN", grace=1.0)
    assert all(gone(pid) for pid in ranks)
    assert seconds < 60  # their sleep is 600


def test_a_process_that_is_not_of_the_command_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        supervised(tmp_path, "stop", grace=5.0)
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("who", ["the driver too", "the guard alone, its driver stopped"])
def test_nobody_is_left_to_tell_the_ranks(tmp_path: Path, who: str) -> None:
    """They find out by themselves (rlhf/lifeline.py)."""
    code = f"""
        import pathlib, sys
        sys.path.insert(0, {str(PROJECT_ROOT)!r})
        from launch.spec import LaunchSpec
        from launch.supervise import supervise
        command = [sys.executable, "-c", {launcher("stop")!r}]
        supervise(LaunchSpec(command, {{}}, {str(tmp_path)!r}, []), pathlib.Path("log"))
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    try:
        ranks = [wait_for(lambda i=i: pid_of(tmp_path / f"pid{i}")) for i in range(2)]
        guarding = guard_of(ranks[0])
        driver.send_signal(signal.SIGKILL if who == "the driver too" else signal.SIGSTOP)
        os.kill(guarding, signal.SIGKILL)
        wait_for(lambda: all(gone(pid) for pid in ranks))
        assert (tmp_path / "saved0").exists()
        assert (tmp_path / "saved1").exists()
    finally:
        driver.kill()
        driver.wait()


def test_a_signal_to_the_driver_after_its_guard_was_killed(tmp_path: Path) -> None:
    """SIGTERM of the driver is still 143, and ends the ranks."""
    code = f"""
        import pathlib, sys
        sys.path.insert(0, {str(PROJECT_ROOT)!r})
        from launch.spec import LaunchSpec
        from launch.supervise import supervise
        command = [sys.executable, "-c", {launcher("signal.SIG_IGN")!r}]
        done = supervise(LaunchSpec(command, {{}}, {str(tmp_path)!r}, []), pathlib.Path("log"),
                         grace=300.0)
        sys.exit(128 + done.interrupted)
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    try:
        ranks = [wait_for(lambda i=i: pid_of(tmp_path / f"pid{i}")) for i in range(2)]
        os.kill(guard_of(ranks[0]), signal.SIGKILL)
        driver.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(60) == 128 + signal.SIGTERM
        wait_for(lambda: all(gone(pid) for pid in ranks))
    finally:
        driver.kill()
        driver.wait()


def test_a_number_that_another_process_got_is_not_the_guard() -> None:
    mine = guard.identity(os.getpid())
    pid, start, boot = mine.split()
    assert lifeline.is_alive(mine)
    assert boot == lifeline.boot()
    assert not lifeline.is_alive(f"{pid} {int(start) + 1} {boot}")
    assert guard.GUARD == lifeline.GUARD
    assert guard.GRACE == lifeline.GRACE


def test_a_guard_of_another_machine_is_not_watched(tmp_path: Path) -> None:
    line = lifeline.Lifeline(tmp_path, 0, {lifeline.GUARD: "1 1 another-boot"})
    before = threading.active_count()
    line.start()
    assert threading.active_count() == before
