"""A publish that is killed, or meets a real full or read-only disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMON = """
    import os, random, signal, sys, time
    from pathlib import Path
    from rlhf.errors import ArtifactError, UserError
    from rlhf.store import publish, verify, write_json_atomic
    from rlhf.store.publishing import clean
    import rlhf.store.publishing as module

    step_dir, mode = Path(sys.argv[1]), sys.argv[2]

    def put(version):
        def write(directory):
            (directory / "part").mkdir()
            for number in range(3):
                path = directory / "part" / f"{number}.bin"
                path.write_bytes(bytes([version % 256]) * 50_000)
        return publish(step_dir, write, kind="sft", step=1, parents={}, data_fingerprint="",
                       tokenizer_fingerprint="", config={"version": version}, metrics={})

    recovered = []
    if mode == "fallback":
        module.exchange = lambda first, second: False

    def check(before, round):
        try:
            manifest = verify(step_dir / "artifact", "sft")
        except ArtifactError as error:
            # Only without an atomic exchange may the name be absent for a moment.
            assert mode == "fallback" and "rename it" in str(error), (round, str(error))
            recovered.append(round)
            clean(step_dir / "artifact")
            manifest = verify(step_dir / "artifact", "sft")
        version = manifest.config["version"]
        assert version >= before, (round, version, before)
        data = (step_dir / "artifact/part/0.bin").read_bytes()
        assert data == bytes([version % 256]) * 50_000
        return version
"""
EVERY_POINT = """
    # The child dies at its n-th audit event (open, mkdir, rename, remove, ctypes call, ...).
    before, killed = put(0).config["version"], 0
    for n in range(1, 10_000):
        child = os.fork()
        if child == 0:
            seen = 0
            def hook(event, arguments):
                global seen
                seen += 1
                if seen == n:
                    os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            put(before + 1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        before = check(before, n)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        killed += 1
    assert killed > 30, killed
    assert bool(recovered) == (mode == "fallback"), recovered
    put(before + 1)
    assert [path.name for path in step_dir.iterdir()] == ["artifact"]
    print("killed", killed)
"""
AMENDED = """
    from rlhf.store import amend
    def first(directory):
        (directory / "actor").mkdir()
        (directory / "actor" / "README.md").write_text("figure 0")
        (directory / "actor" / "w.bin").write_bytes(b"w" * 50_000)
    made = publish(step_dir, first, kind="ppo", step=3, parents={}, data_fingerprint="",
                   tokenizer_fingerprint="", config={}, metrics={"figure": 0})
    inode = (step_dir / "artifact/actor/w.bin").stat().st_ino
    put = lambda figure: amend(
        step_dir / "artifact", {"actor/README.md": f"figure {figure}"}, {"figure": figure})

    def check(round):
        try:
            manifest = verify(step_dir / "artifact", "ppo")
        except ArtifactError as error:
            assert mode == "fallback" and "rename it" in str(error), (round, str(error))
            recovered.append(round)
            clean(step_dir / "artifact")
            manifest = verify(step_dir / "artifact", "ppo")
        figure = manifest.metrics["figure"]
        assert (step_dir / "artifact/actor/README.md").read_text() == f"figure {figure}"
        assert (step_dir / "artifact/actor/w.bin").stat().st_ino == inode
        assert manifest.content_id == made.content_id
        return figure

    killed, figures = 0, {0}
    for n in range(1, 10_000):
        child = os.fork()
        if child == 0:
            seen = 0
            def hook(event, arguments):
                global seen
                seen += 1
                if seen == n:
                    os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            put(n)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        figures.add(check(n))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0 and n in figures
            break
        killed += 1
    assert killed > 30 and len(figures) > 1, (killed, figures)
    assert bool(recovered) == (mode == "fallback"), recovered
    assert put(-1).id != made.id
    assert [path.name for path in step_dir.iterdir()] == ["artifact"]
    print("killed", killed)
"""
RANDOM = """
    before = put(0).config["version"]
    rounds = random.Random(int(sys.argv[3]))
    for round in range(25):
        child = os.fork()
        if child == 0:
            for version in range(before + 1, before + 1000):
                put(version)
            os._exit(1)
        time.sleep(rounds.random() * 0.06)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before = check(before, round)
    put(before + 1)
    assert [path.name for path in step_dir.iterdir()] == ["artifact"]
    print("versions", before)
"""


def run(script: str, *arguments: str, prefix: tuple[str, ...] = ()) -> str:
    source = textwrap.dedent(COMMON) + textwrap.dedent(script)
    command = [*prefix, sys.executable, "-c", source, *arguments]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("mode", ["exchange", "fallback"])
def test_an_amendment_killed_at_every_point(tmp_path: Path, mode: str) -> None:
    """The card and the metrics are the old ones or the new ones, both; the weights never change."""
    assert "killed" in run(AMENDED, str(tmp_path), mode)


@pytest.mark.parametrize("mode", ["exchange", "fallback"])
def test_killed_at_every_point(tmp_path: Path, mode: str) -> None:
    """DESIGN: whatever the moment of a SIGKILL, the old or the new artifact verifies."""
    assert "killed" in run(EVERY_POINT, str(tmp_path), mode)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    seed = str(int.from_bytes(os.urandom(2), "big"))
    print("seed", seed)
    run(RANDOM, str(tmp_path), "exchange", seed)


def can_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/mnt"]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_real_full_and_read_only_disk(tmp_path: Path, state: str) -> None:
    """A disk of 400 kB, or mounted read-only: the message names path and remedy."""
    if not can_mount():
        pytest.skip("mounting a small tmpfs needs root and unshare")
    script = """
        import subprocess
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", step_dir], check=True)
        before = put(1)
        write_json_atomic(step_dir / "pipeline.json", {"a": 1})
        if mode == "full":
            filler = step_dir / "filler"
            try:
                filler.write_bytes(b"x" * 400_000)
            except OSError:
                pass
            remedy = "free some space"
        else:
            subprocess.run(["mount", "-o", "remount,ro", step_dir], check=True)
            remedy = "choose a writable"
        for attempt in (lambda: put(2),
                        lambda: write_json_atomic(step_dir / "pipeline.json", {"a": "x" * 9999})):
            try:
                attempt()
            except UserError as error:
                print(error)
                assert remedy in str(error) and str(step_dir) in str(error), error
            else:
                raise AssertionError("the disk took it")
        assert verify(step_dir / "artifact") == before
        assert (step_dir / "pipeline.json").read_text().strip() == '{\\n  "a": 1\\n}'
        names = {path.name for path in step_dir.iterdir()} - {"filler"}
        assert names == {"artifact", "pipeline.json"}, names
    """
    run(script, str(tmp_path), state, prefix=("unshare", "-m"))
