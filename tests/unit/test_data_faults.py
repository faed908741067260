"""C14: one file with every fault that CAPABILITIES names, through each step and the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.cutting import LEFT
from rlhf.errors import DataError
from rlhf.store import RunDir
from tests.unit import model_help as help_
from tests.unit.data_help import gpt2_like, pair, run

MEGABYTE = 1 << 20
GOOD = 12


def line(number: int, **changes: Any) -> bytes:
    return json.dumps(pair(number, **changes)).encode()


def without(column: str) -> bytes:
    row = pair(100)
    del row[column]
    return json.dumps(row).encode()


# (what it is, the line, the reason under which it counts as bad in steps 1, 2 and 3 or None)
FAULTS: list[tuple[str, bytes, tuple[str | None, str | None, str | None]]] = [
    ("truncated", line(200)[:40], ("broken JSON",) * 3),
    ("number for text", line(201, prompt=7), ("column 'prompt' is int, not text",) * 3),
    ("list for text", line(202, chosen=[]), ("column 'chosen' is an empty list, not text",) * 3),
    (
        "no prompt",
        without("prompt").replace(b"yes", b"why"),
        ("no prompt, and chosen and rejected do not begin alike",) * 3,
    ),
    ("no chosen", without("chosen"), (None, "column 'chosen' is missing", None)),
    ("empty prompt", line(203, prompt=""), ("column 'prompt' is empty",) * 3),
    (
        "blank answer",
        line(204, rejected=" \n"),
        (None, "column 'rejected' is empty, so the row is left out", None),
    ),
    ("NUL byte", line(205).replace(b"question", b"quest\0ion"), ("NUL byte",) * 3),
    ("escaped NUL", line(206, chosen=" a\0b"), ("NUL byte",) * 3),
    ("not UTF-8", line(207).replace(b"question", b"\xff\xfequestion"), ("not UTF-8",) * 3),
    ("lone surrogate", line(208).replace(b"question", b"\\ud800"), ("not UTF-8",) * 3),
    ("equal pair", line(209, rejected=" yes 209."), (None, "chosen equals rejected", None)),
    ("not an object", b'["prompt"]', ("not a JSON object",) * 3),
]
FIRST = GOOD + 1  # the faults' first line
DUPLICATE = FIRST + len(FAULTS)
LONG_PROMPT, CUT_OFF = DUPLICATE + 1, DUPLICATE + 2


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good rows, one line of each fault, a duplicate, a long prompt, and an end that lacks."""
    lines = [line(i) for i in range(GOOD)]
    lines += [raw for _, raw, _ in FAULTS]
    lines += [line(3), line(301, prompt="word " * 200 + "?\n\nAssistant:")]
    path = tmp_path_factory.mktemp("faults") / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" + line(302)[:-20])  # no newline: cut off
    return path


@pytest.mark.parametrize("step", [1, 2, 3])
def test_every_fault_is_counted_and_located(path: Path, tmp_path: Path, step: int) -> None:
    share = tuple(float(step == number) for number in (1, 2, 3))
    data = run(path, gpt2_like(), tmp_path, step, split=share, eval_fraction=0)
    report = data.report
    expected: dict[str, list[str]] = {}
    for number, (_, _, reasons) in enumerate(FAULTS, FIRST):
        if (reason := reasons[step - 1]) is not None:
            expected.setdefault(reason, []).append(f"{path}:{number}")
    expected.setdefault("broken JSON", []).append(f"{path}:{CUT_OFF}")
    assert report.bad == {why: (len(places), places) for why, places in expected.items()}
    fine = sum(reasons[step - 1] is None for _, _, reasons in FAULTS)
    assert report.kept == GOOD + fine + 2  # the duplicate and the long one are kept
    assert report.read == GOOD + len(FAULTS) + 3
    assert (report.duplicates, report.places["duplicates"]) == (1, [f"{path}:{DUPLICATE}"])
    assert report.truncated[LEFT] == 1
    assert report.places[f"truncated: {LEFT}"] == [f"{path}:{LONG_PROMPT}"]
    for row in data.dataset:
        ids = [len(value) for name, value in row.items() if name.endswith("_ids")]
        assert max(ids) <= 300
    said = "\n".join(report.lines())
    for why, places in expected.items():
        assert f"bad: {why}: {len(places)} ({', '.join(places)})" in said


def test_at_the_limit_it_goes_on_and_over_it_stops(path: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"split": (0, 1, 0), "eval_fraction": 0}
    bad = run(path, gpt2_like(), tmp_path, **settings).report.bad_rows
    assert run(path, gpt2_like(), tmp_path, max_bad_rows=bad, **settings).report.kept == GOOD + 2
    with pytest.raises(DataError, match=rf"{bad} of {GOOD + len(FAULTS) + 3} rows cannot be used"):
        run(path, gpt2_like(), tmp_path, max_bad_rows=bad - 1, **settings)


def test_rows_of_a_megabyte(tmp_path: Path) -> None:
    """They are read, tokenised and cut like any other, and named."""
    big = "word " * (MEGABYTE // 5)
    rows = [line(0), line(1, chosen=" " + big), line(2, prompt=big + "?\n\nAssistant:")]
    path = tmp_path / "big.jsonl"
    path.write_bytes(b"\n".join(rows))
    report = run(path, gpt2_like(), tmp_path, split=(0, 1, 0), eval_fraction=0).report
    assert (report.kept, report.truncated) == (3, {"answer": 1, LEFT: 1})
    assert report.places["truncated: answer"] == [f"{path}:2"]
    assert report.places[f"truncated: {LEFT}"] == [f"{path}:3"]


def test_the_driver_stops_before_training(path: Path, tmp_path: Path) -> None:
    """Exit code 3, each place named, no metrics and no artifact: `python train.py --step 1`."""
    command = [
        sys.executable, str(help_.ROOT / "train.py"), "--step", "1", "--name", "bad",
        "--output-dir", str(tmp_path), "--actor-model", help_.tiny(), "--data-path", str(path),
        "data.max_bad_rows=0", "data.split=1,0,0", f"data.cache_dir={tmp_path / 'cache'}",
        "track.trackers=[]", "step1.max_length=64", "step1.max_prompt_length=40",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "data.max_bad_rows allows 0" in done.stderr
    assert f"bad: broken JSON: 2 ({path}:{FIRST}, {path}:{CUT_OFF})" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    run_dir = RunDir(tmp_path / "bad")
    assert not run_dir.metrics(1).exists()
    assert not run_dir.artifact("sft").exists()
    assert not (tmp_path / "cache").exists()  # the checks found it: no step was started
