"""rlhf.harness: how a step's process ends, and what it leaves for the driver.

`run_step` ends its process, so it runs in a fork of this one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from rlhf import harness
from rlhf.config.schema import ResolvedStep, RunConfig
from rlhf.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    Diverged,
    RequirementError,
    at_its_end,
    with_notes,
)
from rlhf.harness import StepRun, Stopped, only_one, run_step
from rlhf.resume import Keeper
from rlhf.stages import SFT
from rlhf.store import RunDir, verify
from tests.unit import model_help as help_
from tests.unit.driver_help import make_artifact


def resolved(run_dir: Path, step: int = 1, **changes: Any) -> ResolvedStep:
    return ResolvedStep(step=step, run_dir=str(run_dir), config=RunConfig(), **changes)  # type: ignore[arg-type]


def in_fork(tmp_path: Path, main: Callable[[StepRun], None], rank: int = 0) -> tuple[int, str]:
    """(exit code or -signal, what the console showed) of `run_step(1, main)`."""
    path = tmp_path / "resolved.json"
    path.write_text(resolved(tmp_path).model_dump_json())
    console = tmp_path / "console"
    child = os.fork()
    if child == 0:
        with console.open("w", buffering=1, encoding="utf-8") as stream:
            os.environ["RANK"] = str(rank)
            os.environ.pop("WORLD_SIZE", None)
            sys.argv = ["main.py", "--config", str(path)]
            sys.stdout = sys.stderr = stream
            os.dup2(stream.fileno(), 2)
            try:
                run_step(1, main)
            finally:
                os._exit(99)  # run_step ends the process itself
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), console.read_text(encoding="utf-8")


def record(tmp_path: Path, rank: int = 0) -> dict[str, Any] | None:
    path = tmp_path / "step1_sft" / "logs" / f"rank{rank}.failure.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_a_step_that_ends_well(tmp_path: Path) -> None:
    """Exit code 0, no record, an old record is gone, and the log has the console's lines."""
    logs = tmp_path / "step1_sft" / "logs"
    logs.mkdir(parents=True)
    (logs / "rank0.failure.json").write_text("{}")

    def main(run: StepRun) -> None:
        with run.phase("work"):
            run.say("naïve \ufffd line")
        print("50%\r100%", file=sys.stderr)
        assert run.phases["work"] >= 0

    code, console = in_fork(tmp_path, main)
    assert code == 0
    assert record(tmp_path) is None
    assert "step 1: work\nnaïve \ufffd line\n" in console
    log = (logs / "rank0.log").read_text(encoding="utf-8")
    assert "naïve \ufffd line\n" in log
    assert "50%\n100%" in log


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("lr = 0: must be above 0; set lr"), 2),
        (DataError("rows.jsonl: no rows; give --data-path"), 3),
        (ArtifactError("corrupt; run step 1"), 3),
    ],
)
def test_a_users_error(tmp_path: Path, error: Exception, code: int) -> None:
    """Issue 2: its own exit code, its message alone on the console, the record for the driver."""

    def main(run: StepRun) -> None:
        with run.phase("read the data"):
            raise error

    found, console = in_fork(tmp_path, main)
    assert found == code
    assert f"error: {error}" in console
    assert "Traceback" not in console
    wrote = record(tmp_path)
    assert wrote is not None
    assert wrote["type"] == type(error).__name__
    assert (wrote["message"], wrote["exit_code"], wrote["rank"]) == (str(error), code, 0)
    assert wrote["phase"] == "read the data"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("shapes do not match"), ""),
        (torch.OutOfMemoryError("CUDA: tried to allocate 20 GiB"), "micro_batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "ZeRO stage"),
        (MemoryError(), "micro_batch_size"),
    ],
)
def test_any_other_error(tmp_path: Path, error: Exception, remedy: str) -> None:
    """Issue 2, U: exit code 1, the traceback in the log and in the record; out of memory has a
    remedy in the order of cost. Rank 1 writes its own files."""

    def main(run: StepRun) -> None:
        with run.phase("train"):
            raise error

    code, console = in_fork(tmp_path, main, rank=1)
    assert code == 1
    assert "Traceback" in console
    assert type(error).__name__ in console
    assert record(tmp_path, 0) is None
    wrote = record(tmp_path, 1)
    assert wrote is not None
    assert (wrote["type"], wrote["exit_code"]) == (type(error).__name__, 1)
    assert (wrote["phase"], wrote["rank"]) == ("train", 1)
    assert "raise error" in wrote["traceback"]
    assert remedy in wrote["remedy"]
    assert bool(wrote["remedy"]) == bool(remedy)
    assert "Traceback" in (tmp_path / "step1_sft" / "logs" / "rank1.log").read_text()


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    """Only rank 0 says a phase; the others' logs have it."""
    code, console = in_fork(tmp_path, lambda run: run.say("hello"), rank=1)
    assert code == 0
    assert "hello" not in console
    assert "hello" in (tmp_path / "step1_sft" / "logs" / "rank1.log").read_text()


def test_bad_arguments_end_before_anything_is_written(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        sys.argv = ["main.py", "--no-such-setting", "1", "--config", "x"]
        sys.stderr = (tmp_path / "err").open("w")
        try:
            run_step(1, lambda run: None)
        except SystemExit as error:
            os._exit(int(str(error.code)))
        os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 2
    assert "no-such-setting" in (tmp_path / "err").read_text().replace("_", "-")


def test_a_process_whose_launcher_is_killed_ends(tmp_path: Path) -> None:
    """None is orphaned: the kernel ends a rank when the process that started it is gone."""
    code = (
        "import os, time\n"
        "from rlhf.harness import _die_with_launcher\n"
        "if os.fork() == 0:\n"
        "    _die_with_launcher()\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "time.sleep(60)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"LOCAL_RANK": "0"})
    try:
        pid = wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    finally:
        launcher.kill()
        launcher.wait()
    assert wait_for(lambda: not alive(int(pid))), "the rank outlived its launcher"


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    return condition()


def test_parents_are_proven_first(tmp_path: Path) -> None:
    """Done when: flipping one byte of a parent is caught before training, also without a driver;
    what happens to it during training costs nothing."""
    make_artifact(tmp_path, 1, {})
    artifact = tmp_path / "step1_sft" / "artifact"
    told = resolved(tmp_path, step=2, parents={"sft": str(artifact), "reward": "org/model"})
    run = StepRun(told, rank=0)
    assert run.parent("sft") == str(artifact)
    assert run.parent("reward") == "org/model"
    weights = artifact / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    records = run.parent_records()
    assert records["sft"]["id"]
    assert records["reward"] == {"path": "org/model", "id": None}
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        StepRun(told, rank=0).parent("sft")
    assert StepRun(told, rank=1).parent("sft") == str(artifact), "rank 0 is enough"
    with pytest.raises(ArtifactError, match=r"step 1 needs a 'sft' artifact"):
        StepRun(resolved(tmp_path), rank=0).parent("sft")


KILLED = """
import os, signal, sys
from rlhf.models.save import Snapshot
from rlhf.harness import run_step
from step1_sft.main import main
write = Snapshot.write
def and_die(self, directory, *args, **options):
    write(self, directory, *args, **options)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    os.kill(os.getpid(), signal.SIGKILL)
Snapshot.write = and_die
run_step(1, main)
"""


def test_a_step_killed_while_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Done when: killing a step leaves no artifact that the next step would accept. Here SIGKILL
    hits after the weights were half written, the latest moment before the manifest."""
    row = {"chosen": " Hello!", "rejected": " No."}
    rows = [row | {"prompt": f"\n\nHuman: Hi {i}\n\nAssistant:"} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = RunConfig(
        name="run",
        output_dir=str(tmp_path),
        data={"path": [str(tmp_path / "train.jsonl")], "cache_dir": str(tmp_path / "cache")},
        step1={"model": {"name": help_.tiny()}, "max_prompt_length": 40, "max_length": 60,
               "train": {"max_steps": 1}},
        track={"trackers": []},
    )  # fmt: skip
    run_dir = tmp_path / "run"
    told = ResolvedStep(step=1, run_dir=str(run_dir), config=settings)
    (tmp_path / "resolved.json").write_text(told.model_dump_json())
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "--config", str(tmp_path / "resolved.json")],
        cwd=help_.ROOT, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    step_dir = run_dir / "step1_sft"
    assert list(step_dir.glob(".artifact.tmp-*")), "it was writing"
    with pytest.raises(ArtifactError):
        verify(step_dir / "artifact", "sft")
    code = train.main(["--step", "2", "--output-dir", str(tmp_path), "--name", "run", "--dry-run"])
    assert code == 3
    error = capsys.readouterr().err
    assert "step 2 builds on step 1" in error
    assert "--step 1" in error


def test_the_oom_remedy_is_ordered_by_cost() -> None:
    text = harness.OOM_REMEDY
    order = ["micro_batch_size", "gradient_checkpointing", "bfloat16", "ZeRO", "lora", "offload"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)


def test_a_signal_outside_the_training_loop_ends_at_once(tmp_path: Path) -> None:
    """Nothing is there to save yet: exit code 128 + the signal, and where it was."""
    for number in (signal.SIGTERM, signal.SIGINT):

        def main(run: StepRun, number: int = number) -> None:
            with run.phase("load the model"):
                os.kill(os.getpid(), number)
                raise AssertionError("goes on after the signal")

        code, console = in_fork(tmp_path, main)
        assert code == 128 + number
        assert f"stopped by {signal.Signals(number).name} in: load the model" in console


def test_in_the_training_loop_a_signal_is_only_noted(tmp_path: Path) -> None:
    """The loop saves and raises Stopped; SIGTERM may come again, from launchers."""

    def main(run: StepRun) -> None:
        run.can_save = True
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop == signal.SIGTERM
        raise Stopped(run.stop)

    code, _ = in_fork(tmp_path, main)
    assert code == 143
    assert record(tmp_path) is None


def test_a_second_start_waits_for_the_first(tmp_path: Path) -> None:
    """Ranks that outlive their driver may be saving: the next start waits, then refuses."""
    run = StepRun(resolved(tmp_path), rank=0)
    run.step_dir.mkdir(parents=True)
    with only_one(run):
        second = only_one(run, wait=0.2)
        with pytest.raises(
            RequirementError, match=rf"rank 0: process {os.getpid()} .*still work here after 0 s"
        ):
            second.__enter__()
        with only_one(StepRun(resolved(tmp_path), rank=1), wait=0.2):
            pass
    with only_one(run, wait=0.2):
        pass


def test_the_rows_of_a_divergence_are_kept(tmp_path: Path) -> None:
    def main(run: StepRun) -> None:
        raise Diverged("the loss is nan", {"input_ids": torch.tensor([[1, 2]])})

    code, console = in_fork(tmp_path, main)
    place = tmp_path / "step1_sft" / "diverged" / "rank0.safetensors"
    assert code == 1
    assert load_file(place)["input_ids"].tolist() == [[1, 2]]
    assert f"The rows are in {place}" in console
    wrote = record(tmp_path)
    assert wrote is not None
    assert wrote["type"] == "Diverged"


def test_figures_of_an_earlier_try_are_kept_apart(tmp_path: Path) -> None:
    """A step that starts again begins a new metrics.jsonl; nothing of the old one is lost."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    harness.put_away(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    (kept,) = tmp_path.glob("metrics.*.jsonl")
    assert kept.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("error", [RuntimeError("it broke"), DataError("rows: none; give some")])
def test_a_failure_at_the_end_is_told_beside_the_first(tmp_path: Path, error: Exception) -> None:
    """A checkpoint that cannot be written while the step fails of something else: both are told."""

    def full() -> None:
        raise RequirementError("resume/: the disk is full")

    def main(run: StepRun) -> None:
        run.at_end.append(full)
        raise error

    code, console = in_fork(tmp_path, main)
    assert code == getattr(error, "exit_code", 1)
    wrote = record(tmp_path)
    assert wrote is not None
    assert wrote["type"] == type(error).__name__
    for text in (console, wrote["message"]):
        assert str(error) in text
        assert "and at its end: RequirementError: resume/: the disk is full" in text


def test_a_failure_at_the_end_alone_is_a_failure(tmp_path: Path) -> None:
    def full() -> None:
        raise RequirementError("resume/: the disk is full")

    code, console = in_fork(tmp_path, lambda run: run.at_end.append(full))
    assert code == 3
    assert "error: resume/: the disk is full" in console


def test_a_save_that_nobody_waited_for_tells_what_went_wrong(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(config=RunConfig(), directory=RunDir(tmp_path), stage=SFT, at_end=[])
    keeper = Keeper(run, {}, data_fingerprint="rows")

    def write() -> None:
        raise OSError(28, "No space left on device")

    keeper._pending = keeper._writer.submit(write)
    with pytest.raises(OSError, match="No space left"):
        run.at_end[0]()
    run.at_end[0]()  # told once


def test_a_failure_at_the_end_is_a_note_to_the_first() -> None:
    """On Python 3.10 too, whose exceptions have no add_note."""

    class OldError(Exception):
        add_note: Any = None

    def fails() -> None:
        raise OSError(28, "No space left on device")

    first = OldError("the loss is nan")
    with pytest.raises(OldError) as caught, at_its_end([fails, fails]):
        raise first
    assert caught.value is first
    lines = with_notes(first).splitlines()
    assert lines[0] == "the loss is nan"
    assert len(lines) == 3
    assert lines[1].startswith("and at its end: OSError: ")
    assert "No space left" in lines[2]
    with pytest.raises(OSError, match="No space"), at_its_end([fails]):
        pass
