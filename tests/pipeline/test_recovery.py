"""Real processes, really ended: a rank that is killed, a driver that is told to stop (issue 5)."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import guard
from launch.guard import descendants, is_rank
from rlhf.models.tiny import build_tiny
from rlhf.store import verify
from rlhf.store.checkpoints import checkpoints
from rlhf.track import read_metrics
from tests.pipeline.test_two_ranks import SETTINGS, write_rows
from tests.soak import digests, figures
from tests.unit import model_help as help_

STEPS = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recovery")
    write_rows(path / "data")
    return path


def start(root: Path, name: str, *flags: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, str(help_.ROOT / "train.py"), "--step", "1", "--name", name,
        "--deployment-type", "single_node", "--num-gpus", "2", "--output-dir", str(root),
        "--actor-model", help_.tiny(), "--data-path", str(root / "data"), *SETTINGS,
        f"data.cache_dir={root / 'cache'}", "step1.train.epochs=3",
        f"step1.train.max_steps={STEPS}", *flags,
    ]  # fmt: skip
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.Popen(
        command, cwd=root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for_steps(process: subprocess.Popen[str], step_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(step_dir / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """The same step, left alone."""
    process = start(root, "whole")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return root / "whole" / "step1_sft"


def test_a_killed_rank_is_started_again(root: Path, whole: Path) -> None:
    """--max-restarts: one rank dies, the other ends with it, both go on from the checkpoint."""
    process = start(root, "killed", "--save-every", "2", "--max-restarts", "1")
    step_dir = root / "killed" / "step1_sft"
    wait_for_steps(process, step_dir, 6)
    ranks = [pid for pid in descendants(process.pid) if is_rank(pid)]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "starting it again; --max-restarts leaves 0 more; from checkpoint step-" in out
    assert "going on from step-" in out
    assert digests(step_dir) == digests(whole)
    assert figures(step_dir) == figures(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_driver_that_is_told_to_stop_saves(
    root: Path, whole: Path, number: signal.Signals
) -> None:
    """128 + the signal, a checkpoint although none was due, no process left; then it goes on."""
    name = f"stopped-{int(number)}"
    process = start(root, name)
    step_dir = root / name / "step1_sft"
    wait_for_steps(process, step_dir, 5)
    below = descendants(process.pid)
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + number, err
    assert time.monotonic() - began < 40
    (saved,) = checkpoints(step_dir / "resume")
    assert f"step 1 is saved at {saved}: the same command goes on from there" in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)
    process = start(root, name)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert f"goes on from {saved.name}" in out
    verify(step_dir / "artifact", "sft")
    assert digests(step_dir) == digests(whole)
    assert figures(step_dir) == figures(whole)


LIMIT = 3_500_000_000  # bytes of address space: 64 rows take about 4.3e9, 32 take 3.4e9


@pytest.mark.parametrize("count", [1, 2])
def test_a_rank_that_is_stopped_is_named(root: Path, whole: Path, count: int) -> None:
    """SIGSTOP to the only process, or to one of two that the other waits for: the run ends with the
    cause, a checkpoint is saved, the same command goes on."""
    name, flags = f"stopped{count}", ("--num-gpus", str(count), "launch.stall_timeout=16")
    process = start(root, name, *flags)
    step_dir = root / name / "step1_sft"
    wait_for_steps(process, step_dir, 4)
    ranks = [pid for pid in descendants(process.pid) if is_rank(pid)]
    assert len(ranks) == count
    os.kill(ranks[-1], signal.SIGSTOP)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    assert f"The driver ended the step: rank {count - 1} (process {ranks[-1]}) stood still" in err
    assert "stopped from outside (SIGSTOP or a debugger; state T in /proc)" in err
    assert "memory" not in err
    (saved,) = checkpoints(step_dir / "resume")
    assert f"Saved: {saved}; the same command goes on from there" in err
    again = start(root, name, *flags)
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    assert f"going on from {saved.name}" in out
    if count == 2:
        assert digests(step_dir) == digests(whole)
        assert figures(step_dir) == figures(whole)


def test_a_slow_rank_is_named(root: Path) -> None:
    """A rank that gets a quarter of its processor (stopped and continued all the time) is named on
    the console while it trains, with its phase; its times are in the step's files."""
    process = start(
        root, "slow", "step1.train.epochs=60", "step1.train.max_steps=200",
        "launch.straggler_seconds=3",
    )  # fmt: skip
    step_dir = root / "slow" / "step1_sft"
    wait_for_steps(process, step_dir, 4)
    pids = [pid for pid in descendants(process.pid) if is_rank(pid)]
    (rank,) = [pid for pid in pids if guard.has_variable(pid, "RANK=1")]
    while process.poll() is None and len(read_metrics(step_dir / "metrics.jsonl")) < 190:
        os.kill(rank, signal.SIGSTOP)
        time.sleep(0.06)
        os.kill(rank, signal.SIGCONT)
        time.sleep(0.02)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    host = socket.gethostname()
    assert f"warning: rank 1 on {host} is slow: its own work in the phase `update` takes" in out
    assert "warning: rank 0" not in out
    rows = read_metrics(step_dir / "metrics.jsonl")
    row = next(row for row in rows if row["step"] == 60 and "train/loss" in row)
    assert row["ranks/seconds_update_slowest_rank"] == 1
    assert row["ranks/seconds_update_max"] > row["ranks/seconds_update_median"] > 0
    lines = (step_dir / "logs" / "ranks.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)["seconds"]["data"]) == 2 for line in lines)


def test_auto_batch_finds_what_fits(root: Path) -> None:
    """--auto-batch with a real lack of memory: the kernel refuses a rank its pages, torch says so,
    and the same optimiser step goes through in halves."""
    size = {"hidden": 64, "layers": 8, "heads": 4, "mlp": 176, "positions": 512}
    build_tiny("llama", help_.TEXTS, root / "long", seed=3, vocab_size=300, size=size)
    rows = [{"prompt": f"Question {i}:", "response": f" {i} is a number." * 100} for i in range(90)]
    (root / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable, str(help_.ROOT / "train.py"), "--step", "1", "--name", "tight",
        "--output-dir", str(root), "--actor-model", str(root / "long"), "--auto-batch",
        "--data-path", str(root / "long.jsonl"), f"data.cache_dir={root / 'cache'}",
        "data.split=1,0,0", "step1.max_prompt_length=64", "step1.max_length=512",
        "step1.train.max_steps=1", "step1.train.batch_size=64", "step1.train.micro_batch_size=96",
        "step1.train.eval_batch_size=2", "track.trackers=[]",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=root, text=True, capture_output=True, timeout=200, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = r"out of memory; --auto-batch sets step1.train.micro_batch_size (\d+) -> (\d+)"
    halvings = [(int(old), int(new)) for old, new in re.findall(told, done.stdout)]
    assert done.stdout.count("--auto-batch sets") == len(halvings)
    # How many it takes depends on how much the machine's libraries map.
    assert halvings == [(64, 32), (32, 16), (16, 8)][: len(halvings)] != []
    verify(root / "tight" / "step1_sft" / "artifact", "sft")
