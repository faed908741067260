"""Processes that stand still are seen from outside, named, and ended (issue 11)."""

from __future__ import annotations

import io
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from launch import standstill
from launch.failure import explain
from launch.spec import PROJECT_ROOT, LaunchSpec
from launch.standstill import Standstill, describe, state
from launch.supervise import Outcome, supervise
from tests.unit.test_launch_guardless import launcher, pid_of, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def no_rank_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test of this process may have made it rank 0, and its children would inherit that."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def watched(tmp_path: Path, code: str, limit: float, stop: tuple[str, ...]) -> tuple[Outcome, str]:
    """Runs the code, stops the processes that wrote these files; (the outcome, what they are)."""
    spec = LaunchSpec([sys.executable, "-c", code], {}, str(tmp_path), [])
    stopped: list[int] = []

    def halt() -> None:
        for name in stop:
            stopped.append(wait_for(lambda n=name: pid_of(tmp_path / n)))
            os.kill(stopped[-1], signal.SIGSTOP)

    thread = threading.Thread(target=halt)
    thread.start()
    outcome = supervise(
        spec, tmp_path / "log", grace=20.0, console=io.BytesIO(),
        still=Standstill(tmp_path, limit, 3600.0),
    )  # fmt: skip
    thread.join()
    return outcome, " ".join(map(str, stopped))


def test_a_stopped_rank_is_named_and_saves(tmp_path: Path) -> None:
    outcome, pid = watched(tmp_path, launcher("stop"), 3.0, ("pid1",))
    assert f"process {pid}" in outcome.lost
    assert "state T in /proc" in outcome.lost
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists(), "it was continued, to save"
    said = str(explain(1, outcome, tmp_path))
    assert "stopped from outside (SIGSTOP or a debugger" in said
    assert "memory" not in said


def test_the_launcher_that_is_stopped_is_named_too(tmp_path: Path) -> None:
    code = launcher("stop").replace(
        "for one in ranks:", 'open("top", "w").write(f"{os.getpid()}\\n")\nfor one in ranks:'
    )
    outcome, pid = watched(tmp_path, code, 3.0, ("top",))
    assert f"process {pid} (python" in outcome.lost


def test_a_rank_that_lets_no_thread_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A regular expression without end holds Python's lock: the rank's own watch never runs. Its
    stack is in its log all the same."""
    monkeypatch.setattr(standstill, "MARGIN_SECONDS", 1.0)
    code = f"""
        import faulthandler, os, pathlib, re, sys, time
        sys.path.insert(0, {str(PROJECT_ROOT)!r})
        os.environ["LOCAL_RANK"] = os.environ["RANK"] = "0"
        log = open("rank0.log", "w")
        faulthandler.enable(log.fileno())
        from rlhf.lifeline import Lifeline
        Lifeline(pathlib.Path("."), 0, os.environ).start()
        time.sleep(3)  # its threads sign
        def a_pattern_without_end():
            re.match("(a+)+$", "a" * 60 + "b")
        a_pattern_without_end()
    """
    outcome, _ = watched(tmp_path, textwrap.dedent(code), 3.0, ())
    assert "rank 0 (process " in outcome.lost
    assert "it computes without letting its other threads run" in outcome.lost
    assert "a_pattern_without_end" in (tmp_path / "rank0.log").read_text()


@pytest.mark.parametrize("limit", [0.0, 60.0])
def test_who_is_stopped_for_a_while_goes_on(tmp_path: Path, limit: float) -> None:
    """Also where nothing is watched (0)."""
    code = """
        import os, time
        open("me", "w").write(f"{os.getpid()}\\n")
        end = time.monotonic() + 5
        while time.monotonic() < end:
            time.sleep(0.1)
    """
    spec = LaunchSpec([sys.executable, "-c", textwrap.dedent(code)], {}, str(tmp_path), [])

    def halt() -> None:
        pid = wait_for(lambda: pid_of(tmp_path / "me"))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3)
        assert state(pid) == b"T"
        os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=halt)
    thread.start()
    outcome = supervise(
        spec, tmp_path / "log", console=io.BytesIO(), still=Standstill(tmp_path, limit, 3600.0)
    )
    thread.join()
    assert (outcome.code, outcome.lost) == (0, "")


def test_a_driver_that_was_stopped_itself_blames_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it was suspended: what stood still meanwhile starts anew."""
    now = [1000.0]
    monkeypatch.setattr(standstill.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(standstill.guard, "descendants", lambda root: [77])
    monkeypatch.setattr(standstill, "state", lambda pid: b"T" if pid == 77 else b"S")
    monkeypatch.setattr(standstill, "signal", standstill.signal)
    sent: list[int] = []
    monkeypatch.setattr(standstill.guard, "signal_these", lambda pids, number: sent.extend(pids))
    still, ended = Standstill(tmp_path, 60.0, 3600.0), []
    for passed in (3.0, 900.0, 3.0, 30.0, 3.0, 30.0):
        now[0] += passed
        still.look(1, lambda: ended.append(1))
    assert not ended
    for _ in range(25):
        now[0] += 3.0
        still.look(1, lambda: ended.append(1))
    assert ended == [1]
    assert 77 in sent


def test_the_other_ranks_have_not_given_up_yet(tmp_path: Path) -> None:
    """A collective that times out after half an hour would be told instead of its cause."""
    assert Standstill(tmp_path, 3600.0, 1800.0)._stopped_limit == 0.75 * 1800
    assert Standstill(tmp_path, 600.0, 1800.0)._stopped_limit == 450


def test_what_a_process_is_called() -> None:
    assert describe(os.getpid()).startswith(f"process {os.getpid()} (")
