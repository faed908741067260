"""Full disks, quotas, read-only directories and locks: a clear end, and what was there is intact.

Real ones: a small tmpfs in a mount namespace of its own (root), and the kernel's limit on a file's
size, which needs no root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launch.spec import PROJECT_ROOT
from rlhf.ranklog import RankLog, Tee
from rlhf.store import read_manifest, verify
from tests.unit.driver_help import write_scripts
from tests.unit.test_driver_run import DRIVE
from tests.unit.test_launch_supervise import alive, wait_for

PRELUDE = """
import os, pathlib, resource, subprocess, sys
sys.path.insert(0, {root!r})
import launch.plan, launch.preflight, train
from launch.launchers import LAUNCHERS
from tests.unit.driver_help import plain
launch.plan.PROJECT_ROOT = pathlib.Path({steps!r})
LAUNCHERS["deepspeed"] = plain
place = pathlib.Path({place!r})

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)

def fill(name="filler", leave=0):
    with open(place / name, "wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"x" * 4096)
        except OSError:
            pass
        stream.truncate(max(0, stream.tell() - leave))
"""


def can_mount(options: str = "size=64k") -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", options, "tmpfs", "/mnt"]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="a small tmpfs needs root and unshare")


def on_small_disk(tmp_path: Path, script: str, **env: str) -> str:
    """Runs `script` after PRELUDE in a mount namespace of its own; returns all that it printed."""
    (tmp_path / "place").mkdir()
    write_scripts(tmp_path / "steps", PROJECT_ROOT)
    code = PRELUDE.format(
        root=str(PROJECT_ROOT), steps=str(tmp_path / "steps"), place=str(tmp_path / "place")
    )
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", code + textwrap.dedent(script)],
        cwd=tmp_path,
        env={**os.environ, "FAKE": "ok", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    # The driver's own would begin a line; of what a fake step printed it quotes the end.
    assert "\nTraceback" not in f"\n{done.stderr}"
    return output


@needs_mount
def test_the_driver_refuses_a_disk_without_room(tmp_path: Path) -> None:
    """Issue 5, atomicity: seen before anything starts; exit code 3."""
    output = on_small_disk(
        tmp_path,
        """
        mount("size=1m")
        assert train.main(["--step", "1", "--output-dir", str(place)]) == 3
        assert list(place.iterdir()) == []
        """,
    )
    assert "0.0 GB free" in output
    assert "use --output-dir on another disk" in output


@needs_mount
@pytest.mark.parametrize("leave", [0, 4096, 8192, 12288])
def test_a_disk_that_fills_up_during_a_run(tmp_path: Path, leave: int) -> None:
    """Issue 5, atomicity: whichever write meets the full disk first (pipeline.json, resolved.json,
    a log, the artifact), the run ends with the cause and the step's previous artifact verifies; and
    with room again the same command succeeds."""
    output = on_small_disk(
        tmp_path,
        f"""
        from rlhf.store import verify
        launch.preflight.SPARE_BYTES = 0
        launch.preflight.planned_artifacts = lambda plan: 0
        mount("size=300k,nr_inodes=1000")
        command = ["--output-dir", str(place), "--name", "r", "--step", "1"]
        assert train.main(command) == 0
        artifact = place / "r/step1_sft/artifact"
        before = verify(artifact)
        pipeline = (place / "r/pipeline.json").read_bytes()
        fill(leave={leave})
        print("=== full", flush=True)
        code = train.main([*command, "--seed", "7", "--force"])
        assert code in (0, 1, 3), code
        assert {leave} > 4096 or code in (1, 3), code
        print("=== code", code, flush=True)
        if code:
            assert verify(artifact).id == before.id
            left = [p for p in (place / "r").rglob(".*") if p.name != ".lock"]
            assert left == [], left
            if {leave} == 0:
                assert (place / "r/pipeline.json").read_bytes() == pipeline
        (place / "filler").unlink()
        assert train.main([*command, "--seed", "7", "--force"]) == 0
        assert verify(artifact).config["seed"] == 7
        """,
    )
    part = output.split("=== full")[1]
    assert "No space left on device" in part or "=== code 0" in part
    if leave == 0:
        assert "free some space" in part


@needs_mount
def test_a_log_on_a_full_disk_costs_the_log_alone(tmp_path: Path) -> None:
    """Issue 5: the step goes on, the console has everything, and why it failed is still told."""
    output = on_small_disk(
        tmp_path,
        """
        from launch import failure
        from launch.spec import LaunchSpec
        from launch.supervise import supervise
        from rlhf.stages import SFT
        mount("size=100k")
        log = place / "logs" / "console.log"
        fill(leave=8192)
        code = "print('first'); print('x' * 20000); print('last words'); raise SystemExit(1)"
        outcome = supervise(LaunchSpec([sys.executable, "-c", code], {}, "/"), log)
        assert outcome.code == 1
        assert log.stat().st_size < 20000
        assert outcome.output().startswith("first") and "last words" in outcome.output()
        print("TOLD", failure.explain(SFT, outcome, log.parent))
        """,
    )
    assert output.count("console.log: cannot be written (No space left on device)") == 1
    assert "last words" in output.split("TOLD")[0]
    assert "| last words" in output.split("TOLD")[1]


@needs_mount
def test_a_read_only_run_directory(tmp_path: Path) -> None:
    output = on_small_disk(
        tmp_path,
        """
        launch.preflight.SPARE_BYTES = 0
        launch.preflight.planned_artifacts = lambda plan: 0
        mount("size=1m")
        (place / "r").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        launch.preflight.os.access = lambda *_: True  # as if it became read-only later
        assert train.main(["--step", "1", "--output-dir", str(place), "--name", "r"]) == 3
        """,
    )
    assert "Read-only file system" in output
    assert "choose a writable --output-dir" in output


@needs_mount
def test_a_checkpoint_on_a_full_disk(tmp_path: Path) -> None:
    """Issue 5: the one before it is intact, and nothing is left to fill the disk. torch's own
    message has no word of a disk."""
    output = on_small_disk(
        tmp_path,
        """
        import torch
        from rlhf.errors import ArtifactError
        from rlhf.resume import _removed_if_failed
        from rlhf.store.checkpoints import begin, finish, newest_proven
        from rlhf.store.files import disk_errors

        def save(position):
            temporary = begin(place, position)
            with _removed_if_failed(temporary), disk_errors(place):
                torch.save({"weights": torch.zeros(30_000)}, temporary / "rank0.pt")
            fields = {"step": 1, "position": position, "world_size": 1, "engines": {}}
            fields |= {"settings": {}, "parents": {}, "data_fingerprint": "d"}
            return finish(temporary, place, fields)

        mount("size=400k")
        first = save(1)
        for leave in (100_000, 124_000, 0):  # in the data, in the record, at once
            fill(leave=leave)
            try:
                save(2)
            except ArtifactError as error:
                print("TOLD", error)
            else:
                raise AssertionError("the disk took it")
            assert newest_proven(place)[0][0] == first
            assert {path.name for path in place.iterdir()} == {first.name, "filler"}
            (place / "filler").unlink()
        assert newest_proven(place)[0][0] == first and save(2) != first
        """,
    )
    told = [line for line in output.splitlines() if line.startswith("TOLD")]
    assert len(told) == 3
    assert all("No space left on device; free some space" in line for line in told), told


QUOTA = "size=1m,usrquota,usrquota_block_hardlimit=100k,mode=777"


@pytest.mark.skipif(not can_mount(QUOTA), reason="this kernel has no quotas on tmpfs, or no root")
def test_a_quota(tmp_path: Path) -> None:
    """The message says that it is the quota. Root has none: another user writes."""
    output = on_small_disk(
        tmp_path,
        f"""
        from rlhf.errors import UserError
        from rlhf.store import write_text_atomic
        mount({QUOTA!r})
        os.setuid(65534)
        write_text_atomic(place / "a", "before")
        try:
            write_text_atomic(place / "a", "x" * 300_000)
        except UserError as error:
            print(error)
        assert [path.name for path in place.iterdir()] == ["a"]
        assert (place / "a").read_text() == "before"
        """,
    )
    assert "your disk quota is used up" in output


@needs_mount
def test_no_inodes_left(tmp_path: Path) -> None:
    """The system's words are those of a full disk; ours are not."""
    output = on_small_disk(
        tmp_path,
        """
        from rlhf.store import write_text_atomic
        from rlhf.errors import UserError
        mount("size=4m,nr_inodes=20")
        try:
            for number in range(100):
                write_text_atomic(place / str(number), "x")
        except UserError as error:
            print(error)
        """,
    )
    assert "no inodes left: remove some files" in output
    assert "free some space" not in output


LIMIT = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
place, mode, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
from rlhf.errors import UserError
from rlhf.store import write_text_atomic
{prepare}
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
# Python ignores the signal and sees EFBIG; by default it kills in the middle of the write.
signal.signal(signal.SIGXFSZ, signal.SIG_DFL if mode == "killed" else signal.SIG_IGN)
try:
    {act}
except UserError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize("mode", ["killed", "refused"])
def test_a_file_that_may_not_grow(tmp_path: Path, mode: str) -> None:
    """A text is whole or the old one, whatever the byte at which the kernel stops the write."""
    target = tmp_path / "pipeline.json"
    code = LIMIT.format(
        root=str(PROJECT_ROOT),
        prepare="",
        act='write_text_atomic(place / "pipeline.json", "new" * 1000)',
    )
    for size in (0, 1, 1500, 2999, 3000):
        target.write_text("old")
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), mode, str(size)],
            capture_output=True,
            text=True,
            check=False,
        )
        if size == 3000:
            assert (done.returncode, target.read_text()) == (0, "new" * 1000)
        else:
            assert done.returncode == (-signal.SIGXFSZ if mode == "killed" else 3), done
            assert target.read_text() == "old"
            assert mode == "killed" or "refuses files of this size" in done.stdout


def test_a_ranks_log_on_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full refuses every write, as a full disk does: told once, and nothing is raised."""
    with RankLog(Path("/dev/full"), sys.stderr) as log:
        tee = Tee(sys.stdout, log)
        for number in range(3):
            print("line", number, file=tee, flush=True)
    shown = capsys.readouterr()
    assert shown.out == "line 0\nline 1\nline 2\n"
    assert shown.err.count("/dev/full: cannot be written (No space left on device)") == 1


def test_a_ranks_log_has_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "planted-value")
    with RankLog(tmp_path / "log", sys.stderr) as log:
        print("a planted-value here", file=log)
    assert (tmp_path / "log").read_text() == "a <redacted> here\n"


def start(tmp_path: Path, **env: str) -> subprocess.Popen[str]:
    write_scripts(tmp_path / "steps", PROJECT_ROOT)
    code = DRIVE.format(root=str(PROJECT_ROOT), steps=str(tmp_path / "steps"))
    quick = "import launch.execute as e; real = e.supervise\n"
    quick += "e.supervise = lambda *a, **k: real(*a, **{**k, 'grace': 2})"
    code = code.replace("sys.exit(", f"{quick}\nsys.exit(", 1)
    return subprocess.Popen(
        [sys.executable, "-c", code, "--step", "1"],
        cwd=tmp_path,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_killed_driver_holds_no_lock(tmp_path: Path) -> None:
    """Issue 5: a second run is refused while the first lives, and while the processes of a killed
    one end it waits for them: two never write at once. Then it runs."""
    first = start(tmp_path, FAKE="sleep")
    mark = tmp_path / "output/tiny_cpu/asleep"
    step = int(wait_for(lambda: mark.exists() and mark.read_text().strip()))
    second = start(tmp_path, FAKE="ok")
    told, _ = second.communicate(timeout=60)
    assert second.returncode == 3
    assert f"another train.py is working in this run directory (process {first.pid} " in told
    assert "Traceback" not in told

    os.kill(step, signal.SIGSTOP)  # it will not listen: the guard has to kill it
    environ = Path(f"/proc/{step}/environ").read_bytes().split(b"\0")
    (guarding,) = (int(e.split(b"=")[1].split()[0]) for e in environ if e[:11] == b"RLHF_GUARD=")
    os.kill(guarding, signal.SIGSTOP)  # not before the third start has met it
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=30)
    assert alive(step)
    third = start(tmp_path, FAKE="ok")
    assert third.stdout is not None
    lines = iter(third.stdout.readline, "")
    assert any("waiting for the processes of a run that was killed" in line for line in lines)
    os.kill(guarding, signal.SIGCONT)
    told, _ = third.communicate(timeout=90)
    assert third.returncode == 0, told
    assert not alive(step)
    assert read_manifest(tmp_path / "output/tiny_cpu/step1_sft/artifact").step == 1


def test_a_lock_file_alone_is_no_lock(tmp_path: Path) -> None:
    """What a dead process wrote into it stops nobody, and costs no wait."""
    (tmp_path / "output/tiny_cpu").mkdir(parents=True)
    (tmp_path / "output/tiny_cpu/.lock").write_text("1 some-host\n")
    began = time.monotonic()
    run = start(tmp_path, FAKE="ok")
    told, _ = run.communicate(timeout=60)
    assert run.returncode == 0, told
    assert time.monotonic() - began < 15
    verify(tmp_path / "output/tiny_cpu/step1_sft/artifact")
