"""What a user is told when a step fails (C8)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import failure
from launch.supervise import Outcome
from rlhf.config.keys import lookup
from rlhf.config.load import load_config, parse_overrides
from rlhf.errors import ConfigError, RequirementError, StepFailed, UserError
from rlhf.stages import get


def told(
    tmp_path: Path,
    *,
    step: int = 1,
    code: int = 1,
    output: str = "",
    problem: str = "",
    **record: Any,
) -> UserError:
    log = tmp_path / "console.log"
    log.write_bytes(b"an earlier run\n" + output.encode())
    if record:
        name = f"rank{record.get('rank', 0)}.failure.json"
        (tmp_path / name).write_text(json.dumps({"rank": 0, "exit_code": 1, **record}))
    outcome = Outcome(code, False, 1.0, log, log_start=len("an earlier run\n"))
    return failure.explain(get(step), outcome, tmp_path, problem)


def test_phase_error_and_log(tmp_path: Path) -> None:
    """Exit code 1: the last lines of its log, the phase and the remedy are shown."""
    output = "".join(f"line {number}\n" for number in range(50)) + "10%\r99%\rValueError: bad\n"
    error = told(tmp_path, output=output, phase="train", type="ValueError", message="bad", rank=1)
    assert isinstance(error, StepFailed)
    assert error.exit_code == 1
    text = str(error)
    assert "step 1 failed: its processes ended with exit code 1" in text
    assert "rank 1 in train: ValueError: bad" in text
    assert "  | line 49\n" in text
    assert "line 30\n" not in text
    assert "  | 99%" not in text
    assert "  | ValueError: bad" in text
    assert "Remedy: " in text
    assert str(tmp_path / "console.log") in text
    assert "an earlier run" not in text


@pytest.mark.parametrize(("code", "kind"), [(2, ConfigError), (3, RequirementError)])
def test_a_users_mistake_is_shown_alone(tmp_path: Path, code: int, kind: type) -> None:
    error = told(
        tmp_path,
        output="much noise\n",
        type="DataError",
        message="rows.jsonl:3: no prompt",
        remedy="rows.jsonl:3: no prompt",
        exit_code=code,
    )
    assert isinstance(error, kind)
    assert error.exit_code == code
    assert str(error) == "step 1: rows.jsonl:3: no prompt"


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize(
    "signs",
    [
        {"type": "OutOfMemoryError", "message": "CUDA out of memory. Tried to allocate 2 GiB"},
        {"type": "RuntimeError", "message": "DefaultCPUAllocator: can't allocate memory: 9 bytes"},
        {"type": "_ArrayMemoryError", "message": "Unable to allocate 2 GiB for an array with..."},
        {"type": "OSError", "message": "[Errno 12] Cannot allocate memory"},
        {"type": "RuntimeError", "message": "could not create a memory object"},
        {"output": "torch.OutOfMemoryError: CUDA out of memory.\n"},
        {"output": "terminate called after throwing an instance of 'std::bad_alloc'\n", "code": -6},
        {"code": -9},
        {"output": "...launch.py... exits with return code = -9\n"},
    ],
)
def test_out_of_memory_names_our_flags(tmp_path: Path, step: int, signs: dict) -> None:
    """C8: what to change, by names that exist."""
    text = str(told(tmp_path, step=step, **signs))
    assert "out of memory" in text
    advice = text.split("Remedy: ")[1].splitlines()[0]
    for word in ("micro_batch_size", "gradient_checkpointing=true", "lora.rank=16", "zero-stage"):
        assert word in advice
    names = [w.strip("(),").split("=") for w in advice.split() if w.strip("(").startswith("step")]
    assert len(names) >= 3
    for name, *value in names:
        assert lookup(name) is not None, name
        if value and "offload" not in name:
            load_config(None, parse_overrides([f"{name}={value[0]}"]))


def test_success_without_an_artifact(tmp_path: Path) -> None:
    """DESIGN: an exit code of 0 proves nothing."""
    text = str(told(tmp_path, code=0, output="bye\n", problem="no MANIFEST.json"))
    assert "it reported success, but its artifact does not verify: no MANIFEST.json" in text


def test_a_ranks_own_remedy(tmp_path: Path) -> None:
    text = str(told(tmp_path, type="X", message="m", remedy="turn it off and on"))
    assert "Remedy: turn it off and on" in text


def test_the_same_failure_of_many_ranks_is_told_once(tmp_path: Path) -> None:
    for rank in range(4):
        record = {"rank": rank, "type": "X", "message": "m" if rank else "first", "exit_code": 1}
        (tmp_path / f"rank{rank}.failure.json").write_text(json.dumps(record))
    (tmp_path / "rank9.failure.json").write_text('{"rank": 9, "mess')
    text = str(told(tmp_path))
    assert text.count("rank ") == 2
    assert "rank 0: X: first" in text
    assert "rank 1: X: m" in text


def test_signals_in_words() -> None:
    assert failure.ending(-11) == "its processes were ended by SIGSEGV"
    assert failure.ending(-200) == "its processes were ended by signal 200"


def test_old_records_are_cleared(tmp_path: Path) -> None:
    told(tmp_path, type="X", message="m")
    failure.clear_records(tmp_path)
    assert failure.read_records(tmp_path) == []


@pytest.mark.parametrize("sign", ["exits with return code = -9", "what():  std::bad_alloc"])
def test_a_rank_that_died_without_a_word_is_heard_over_the_others(
    tmp_path: Path, sign: str
) -> None:
    """The others' records only say that it is gone: the log knows of what."""
    echo = {"type": "RuntimeError", "message": "Connection closed by peer [127.0.0.1]:4242"}
    text = str(told(tmp_path, output=f"{sign}\n", **echo))
    assert "out of memory" in text.split("Remedy: ")[1]
