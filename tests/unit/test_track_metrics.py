"""metrics.jsonl: every line valid JSON, whatever happens to the process or the disk."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config.schema import TrackConfig
from rlhf.errors import RequirementError
from rlhf.track import Tracker, TrackerWarning, open_tracker, read_metrics
from rlhf.track import metrics as metrics_module

ROOT = Path(__file__).parents[2]
NONE = TrackConfig(trackers=[])


def tracker_in(directory: Path, rank: int = 0) -> Tracker:
    return open_tracker(NONE, directory, step=1, rank=rank, config={})


def test_one_valid_object_per_line(tmp_path: Path) -> None:
    """G3 and DESIGN: metrics.jsonl always; NaN and infinities as text."""

    def strict(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    with tracker_in(tmp_path / "step1_sft") as tracker:
        tracker.log({"loss": 0.5, "tokens": 3}, step=1)
        path = tmp_path / "step1_sft/metrics.jsonl"
        assert len(path.read_text().splitlines()) == 1  # flushed, the tracker still open
        tracker.log({"loss": math.nan, "high": math.inf, "low": -math.inf}, step=2)
    lines = [json.loads(line, parse_constant=strict) for line in path.read_text().splitlines()]
    assert lines[0]["step"] == 1
    assert lines[0]["loss"] == 0.5
    assert lines[0]["tokens"] == 3
    assert lines[0]["time"] > 1.7e9
    assert 0 <= lines[0]["seconds"] <= lines[1]["seconds"] < 100
    assert [lines[1][key] for key in ("loss", "high", "low")] == ["NaN", "Infinity", "-Infinity"]
    rows = read_metrics(path)
    assert math.isnan(rows[1]["loss"])
    assert rows[1]["high"] == math.inf
    assert rows[1]["low"] == -math.inf


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(metrics=st.dictionaries(st.text(max_size=8), st.floats() | st.integers(), max_size=4))
def test_what_is_logged_is_read_back(tmp_path: Path, metrics: dict[str, float]) -> None:
    with tracker_in(tmp_path) as tracker:
        tracker.log({f"m/{name}": value for name, value in metrics.items()}, step=7)
    row = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert row["step"] == 7
    back = {name[2:]: value for name, value in row.items() if name.startswith("m/")}
    assert repr(sorted(back.items())) == repr(sorted(metrics.items()))


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    with tracker_in(tmp_path / "step", rank=1) as tracker:
        tracker.log({"loss": 1.0}, step=1)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_surface(tmp_path: Path) -> None:
    with tracker_in(tmp_path) as tracker:
        with pytest.raises(ValueError, match="'time'"):
            tracker.log({"time": 1.0}, step=1)
        with pytest.raises(TypeError, match="'loss'"):
            tracker.log({"loss": "low"}, step=1)  # type: ignore[dict-item]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("rest", [b"", b'{"step": 2, "lo', b"x" * 10_000])
def test_a_resumed_run_appends_after_the_last_whole_line(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + rest)
    assert [row["step"] for row in read_metrics(path)] == [1]
    with tracker_in(tmp_path) as tracker:
        tracker.log({"loss": 1.0}, step=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert path.read_bytes().startswith(b'{"step": 1}\n{"step": 2')


def test_only_a_partial_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"x" * 9_000)
    tracker_in(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_broken_line_is_located(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for line in (b"[1]", b"{", b"\xff"):
        path.write_bytes(b'{"step": 1}\n' + line + b"\n")
        with pytest.raises(RequirementError, match=r"metrics\.jsonl:2"):
            read_metrics(path)


def test_a_killed_run_keeps_its_lines(tmp_path: Path) -> None:
    code = """
import sys
from rlhf.config.schema import TrackConfig
from rlhf.track import open_tracker
tracker = open_tracker(TrackConfig(trackers=[]), sys.argv[1], step=1, rank=0, config={})
for step in range(10**9):
    tracker.log({"loss": 1.0}, step)
    if step == 100:
        print("go", flush=True)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"go\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(steps) > 100
    assert steps == list(range(len(steps)))


def test_a_full_disk_warns_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """STYLE 15: only a tracker may warn and go on. A half-written line is taken back."""
    tracker = tracker_in(tmp_path)
    tracker.log({"loss": 1.0}, step=1)
    real = tracker._file._stream  # type: ignore[union-attr]

    class Full:
        def write(self, data: bytes) -> int:
            return real.write(data[:10])

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    tracker._file._stream = Full()  # type: ignore
    tracker.log({"loss": 2.0}, step=2)
    tracker.log({"loss": 3.0}, step=3)
    tracker._file._stream = real  # type: ignore
    tracker.log({"loss": 4.0}, step=4)
    tracker.close()
    assert [warning.category for warning in recwarn] == [TrackerWarning]
    assert "free some space" in str(recwarn[0].message)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4]


def test_an_unwritable_place_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequirementError, match="cannot be written"):
        tracker_in(tmp_path / "file" / "step")
    (tmp_path / metrics_module.NAME).mkdir()
    with pytest.raises(RequirementError, match="cannot be written"):
        tracker_in(tmp_path)
