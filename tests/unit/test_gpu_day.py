"""benchmarks.gpu_day: parts that fail, hang or are missing end alone; the page says what happened.

And benchmarks.gpu_kit: what a machine lacks, and nothing that it has.
"""

from __future__ import annotations

import json
import sys
import time
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks import gpu_day, gpu_kit
from benchmarks.gpu_page import page
from benchmarks.gpu_parts import read_report
from tests.unit.model_help import ROOT

SCRIPT = """
import json, os, subprocess, sys, time
name, into = sys.argv[1], sys.argv[sys.argv.index("--into") + 1]
when = sys.argv[sys.argv.index("--when") + 1] if "--when" in sys.argv else None
while when and not os.path.exists(when):
    time.sleep(0.01)
if name == "hangs":
    open(into, "w").write(json.dumps({"seen": 1}))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(into + ".child", "w").write(str(child.pid))
    time.sleep(600)
if name == "dies":
    print("last words", flush=True)
    os._exit(7)
open(into, "w").write(json.dumps({"began": time.time()}))
time.sleep(0.3)
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Parts are this script's, instead of the real ones; returns where the day goes."""
    script = tmp_path / "part.py"
    script.write_text(SCRIPT)
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {script} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(gpu_day.sys, "executable", str(wrapper))
    return tmp_path / "day"


def alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_a_part_that_fails_or_hangs_ends_alone(parts: Path) -> None:
    day = gpu_day.Day(parts, small=True, budget=60)
    day.run(
        [
            gpu_day.Part("dies", 20),
            gpu_day.Part("hangs", 1.5),
            gpu_day.Part("absent", 20, needs="no_such_package"),
            gpu_day.Part("works", 20),
        ]
    )
    found = json.loads((parts / "gpu_day.json").read_text())["parts"]
    assert {name: f["state"] for name, f in found.items()} == {
        "dies": "failed", "hangs": "cut off", "absent": "left out", "works": "done",
    }  # fmt: skip
    assert "code 7" in found["dies"]["failed"]
    assert "last words" in found["dies"]["log"]
    assert found["hangs"]["seen"] == 1, "what it had found is kept"
    assert found["absent"]["why"] == "no_such_package is not installed"
    child = int((parts / "hangs.json.child").read_text())
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child), "what a part has started ends with it"
    text = (parts / "gpu_day.md").read_text()
    assert "ended with code 7" in text
    assert "| hangs | cut off |" in text


def test_when_the_time_is_up_the_rest_is_not_run(parts: Path) -> None:
    day = gpu_day.Day(parts, small=True, budget=1.5)
    day.run([gpu_day.Part("hangs", 60), gpu_day.Part("works", 60), gpu_day.Part("again", 60)])
    states = {name: found["state"] for name, found in day.parts.items()}
    assert states == {"hangs": "cut off", "works": "not run", "again": "not run"}


def test_timed_parts_run_one_after_the_other_and_others_beside(parts: Path) -> None:
    day = gpu_day.Day(parts, small=True, budget=60)
    day.run(
        [gpu_day.Part("a", 20, beside=True), gpu_day.Part("b", 20, beside=True),
         gpu_day.Part("c", 20), gpu_day.Part("d", 20)]
    )  # fmt: skip
    assert {found["state"] for found in day.parts.values()} == {"done"}
    began = {name: found["began"] for name, found in day.parts.items()}
    assert began["c"] > max(began["a"], began["b"]) + 0.25
    assert began["d"] > began["c"] + 0.25


def test_every_part_of_the_day_exists() -> None:
    from benchmarks.gpu_parts import PARTS

    assert [part.name for part in gpu_day.PARTS if part.name not in PARTS] == []


def test_a_junit_report_in_figures() -> None:
    counts = read_report(
        '<testsuites><testsuite><testcase classname="t" name="a"/>'
        '<testcase classname="t" name="b"><failure message="m">E   boom</failure></testcase>'
        '<testcase classname="t" name="c"><skipped message="no"/></testcase>'
        '<testcase classname="t" name="d"><error message="worker crashed"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 2, 1)
    assert counts["failures"] == [["t::b", "E   boom"], ["t::d", "worker crashed"]]


def test_the_page_has_what_was_measured_and_nothing_else() -> None:
    """Ratios and errors by hand; a side that did not run leaves no figure."""
    run = {"state": "done", "unit": "samples"}
    parts = {
        "ppo-135m": {**run, "per_second": 60.0, "seconds": [2.0, 2.0], "peak_allocated": 10e9,
                     "peak_reserved": 11e9, "planned": {"peak": 9e9, "at": "actor backward"}},
        "ppo-135m-trl": {**run, "per_second": 30.0, "seconds": [4.0, 5.0]},
        "sft-135m": {**run, "per_second": 200.0, "seconds": [1.0, 1.0, 1.0]},
        "sft-135m-trl": {"state": "failed", "failed": "OutOfMemoryError: no room"},
        "tests": {"state": "done", "passed": 3, "failed": 1, "skipped": 0,
                  "failures": [["t::x", "E   assert 1 == 2"]]},
    }  # fmt: skip
    day = {"date": "2026-11-26", "command": "c", "seconds": 5.0, "small": False, "parts": parts}
    text = page(day)
    ppo = "| ppo 135m, samples/s | 60 (2 runs, 0% apart) | 30 (2 runs, 20% apart) | 2.00 | 10.0 |"
    assert ppo in text
    assert "| sft 135m, samples/s | 200 (3 runs, 0% apart) | failed |  |" in text
    assert "| ppo 135m | 9000 | 10000 | 11000 | -10.0% | actor backward |" in text
    assert "OutOfMemoryError: no room" in text
    assert "E   assert 1 == 2" in text
    assert "3 passed, 1 failed, 0 skipped" in text
    assert "nan" not in text.lower()
    assert "1.3b" not in text


def wheel(directory: Path, name: str, version: str, needs: list[str]) -> Path:
    path = directory / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
    return path


def test_the_kit_has_what_is_missing_and_what_that_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By names as pip spells them; extras, other systems and other Pythons are left out."""
    offers = {
        "Data_Sets": ["dill>=0.3", "torch", 'tomli; python_version < "3.11"', 'x; extra == "dev"'],
        "dill": ['colorama; sys_platform == "win32"'],
    }
    asked: list[str] = []

    def fetch(need: Requirement, into: Path, version: str) -> Path:
        asked.append(str(need))
        assert version == "3.12"
        return wheel(into, need.name, "1.0", offers[need.name])

    monkeypatch.setattr(gpu_kit, "fetch", fetch)
    present = gpu_kit.read_present("torch==2.11.0+cu130\n# a comment\nPyYAML\nmine @ file:///x\n")
    assert present == {"torch", "pyyaml", "mine"}
    needs = [Requirement(text) for text in ("torch>=2", "Data_Sets>=4", "pyyaml", "dill")]
    wheels = gpu_kit.collect(needs, present, tmp_path, "3.12")
    assert asked == ["Data_Sets>=4", "dill"]
    assert [w.name.split("-")[0] for w in wheels] == ["Data_Sets", "dill"]


def test_the_kits_needs_are_the_projects() -> None:
    """And the machine that the kit is for has the large ones."""
    names = {need.name for need in gpu_kit.project_needs()}
    assert names >= {"torch", "deepspeed", "datasets", "pydantic", "pytest", "hypothesis"}
    present = gpu_kit.read_present((ROOT / "benchmarks" / "gpu_present.txt").read_text())
    assert names - present <= {"deepspeed", "datasets", "pydantic", "zstandard"}
    assert {"torch", "transformers", "accelerate", "peft", "pyarrow"} <= present
