"""Supervision: output, codes, interrupts; nobody is orphaned (C6, exit code 130)."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launch.guard import descendants
from launch.spec import PROJECT_ROOT, LaunchSpec
from launch.supervise import Outcome, signal_code, supervise


def run(tmp_path: Path, code: str, grace: float = 5.0) -> tuple[Outcome, bytes]:
    console = io.BytesIO()
    spec = LaunchSpec(
        [sys.executable, "-c", textwrap.dedent(code)], {"V": "1"}, str(tmp_path), ["W"]
    )
    return supervise(spec, tmp_path / "logs" / "console.log", grace=grace, console=console), (
        console.getvalue()
    )


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for(condition, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def read_pid(path: Path) -> int:
    text = path.read_text() if path.exists() else ""
    return int(text) if text.endswith("\n") else 0


def test_console_and_log_get_the_same_bytes(tmp_path: Path) -> None:
    """C6: unfinished lines and carriage returns as they are, stderr too."""
    outcome, console = run(
        tmp_path,
        r"""
        import sys
        sys.stdout.write("10%\r20%\r"); sys.stdout.flush()
        sys.stderr.write("loss 0.5\n"); sys.stderr.flush()
        sys.stdout.buffer.write(b"\xff\xfe end")
        """,
    )
    assert outcome.code == 0
    assert console == b"10%\r20%\rloss 0.5\n\xff\xfe end"
    assert outcome.log.read_bytes() == console


def test_output_comes_while_it_runs(tmp_path: Path) -> None:
    """C6: the console is live."""

    class Console(io.BytesIO):
        def write(self, chunk) -> int:
            if b"first" in chunk:
                (tmp_path / "seen").touch()
            return super().write(chunk)

    code = """
    import os, time
    print("first", flush=True)
    while not os.path.exists("seen"):
        time.sleep(0.01)
    """
    spec = LaunchSpec([sys.executable, "-c", textwrap.dedent(code)], {}, str(tmp_path))
    outcome = supervise(spec, tmp_path / "log", console=Console())
    assert outcome.code == 0


def test_a_log_is_continued(tmp_path: Path) -> None:
    run(tmp_path, "print('one')")
    outcome, _ = run(tmp_path, "print('two')")
    assert outcome.log.read_text() == "one\ntwo\n"
    assert outcome.output() == "two\n"


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W", "x")
    _, console = run(
        tmp_path, "import os; print(os.environ.get('V'), os.environ.get('W'), os.getcwd())"
    )
    assert console.decode().split() == ["1", "None", str(tmp_path)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os._exit(247)", -9),
        ("import os; os._exit(137)", -9),
    ],
)
def test_exit_codes(tmp_path: Path, code: str, expected: int) -> None:
    """deepspeed's launcher passes a rank's SIGKILL on as 247, a shell as 137."""
    assert run(tmp_path, code)[0].code == expected
    assert signal_code(expected) == expected


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    outcome = supervise(LaunchSpec(["/no/such"], {}, str(tmp_path)), tmp_path / "log")
    assert outcome.code == 127
    assert "/no/such: cannot be started" in outcome.output()


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    """A worker in a session of its own (torchrun) outlives its launcher: not here."""
    code = """
    import subprocess, sys
    worker = "import os, time; open('pid', 'w').write(f'{os.getpid()}\\\\n'); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", worker], start_new_session=True)
    import os, time
    while not os.path.exists("pid"):
        time.sleep(0.01)
    """
    outcome, _ = run(tmp_path, code)
    assert outcome.code == 0
    assert not alive(wait_for(lambda: read_pid(tmp_path / "pid")))


DRIVER = """
import sys, pathlib
sys.path.insert(0, {root!r})
from launch.spec import LaunchSpec
from launch.supervise import supervise
outcome = supervise(
    LaunchSpec([sys.executable, "launcher.py"], {{}}, {cwd!r}), pathlib.Path({cwd!r}, "log"),
    grace={grace},
)
print("OUTCOME", outcome.interrupted, outcome.code, flush=True)
"""
LAUNCHER = """
import subprocess, sys
workers = [
    subprocess.Popen([sys.executable, "worker.py", str(rank)], start_new_session=rank == 1)
    for rank in range(2)
]
for worker in workers:
    worker.wait()
"""
WORKER = """
import os, signal, sys, time
{ignore}
rank = sys.argv[1]
open(f"pid{{rank}}.tmp", "w").write(f"{{os.getpid()}}\\n")
os.rename(f"pid{{rank}}.tmp", f"pid{{rank}}")
time.sleep(600)
"""
STUBBORN = (
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)"
)


def start_driver(
    tmp_path: Path, grace: float, ignore: str = ""
) -> tuple[subprocess.Popen, list[int]]:
    """A driver in a process of its own, with a launcher and two workers below it."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "worker.py").write_text(WORKER.format(ignore=ignore))
    code = DRIVER.format(root=str(PROJECT_ROOT), cwd=str(tmp_path), grace=grace)
    driver = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for rank in range(2):
        wait_for(lambda rank=rank: read_pid(tmp_path / f"pid{rank}"))
    below = descendants(driver.pid)
    assert len(below) == 4  # guard, launcher, two workers
    return driver, below


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_everything(tmp_path: Path, number: signal.Signals) -> None:
    """The signal is told; children end too, workers with a session of their own as well."""
    driver, below = start_driver(tmp_path, grace=30)
    driver.send_signal(number)
    out, _ = driver.communicate(timeout=30)
    assert f"OUTCOME {int(number)} " in out
    assert not any(alive(pid) for pid in below)


def test_who_does_not_listen_is_killed(tmp_path: Path) -> None:
    """After the grace period SIGKILL; a second interrupt does not wait for it."""
    driver, below = start_driver(tmp_path, grace=0.5, ignore=STUBBORN)
    driver.send_signal(signal.SIGTERM)
    assert "OUTCOME 15 " in driver.communicate(timeout=30)[0]
    assert not any(alive(pid) for pid in below)


def test_a_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    driver, below = start_driver(tmp_path, grace=500, ignore=STUBBORN)
    driver.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert any(alive(pid) for pid in below)
    driver.send_signal(signal.SIGINT)
    assert "OUTCOME 2 " in driver.communicate(timeout=30)[0]
    assert not any(alive(pid) for pid in below)


def test_a_killed_driver_leaves_nobody(tmp_path: Path) -> None:
    """SIGKILL gives the driver no chance to tidy up: the kernel tells the guard."""
    driver, below = start_driver(tmp_path, grace=5)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate(timeout=30)
    wait_for(lambda: not any(alive(pid) for pid in below))


def test_a_closed_console_does_not_stop_the_run(tmp_path: Path) -> None:
    """`python train.py | head`: the log goes on."""

    class Closed(io.BytesIO):
        def write(self, chunk) -> int:
            raise BrokenPipeError

    spec = LaunchSpec([sys.executable, "-c", "print('all of it')"], {}, str(tmp_path))
    outcome = supervise(spec, tmp_path / "log", console=Closed())
    assert (outcome.code, outcome.output()) == (0, "all of it\n")


def test_signals_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run(tmp_path, "pass")
    assert signal.getsignal(signal.SIGINT) is before
