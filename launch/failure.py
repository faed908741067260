"""Why a step failed, for a person: what the ranks recorded, the log's end, what to change."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.supervise import Outcome
from rlhf.errors import ConfigError, RequirementError, StepFailed, UserError
from rlhf.stages import Stage

TAIL_LINES = 20
TRACEBACK = 12
# CUDA's words, torch's CPU allocator's, the system's, Python's and numpy's, C++'s, oneDNN's.
_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|can't allocate memory|cannot allocate memory|MemoryError\b|"
    r"unable to allocate .* for an array|std::bad_alloc|could not create a memory object",
    re.IGNORECASE,
)
_KILLED = re.compile(r"Signal 9 \(SIGKILL\)|return code = -9|exitcode\s*: -9")
# What the other ranks see when one dies: gloo's, NCCL's and the rendezvous store's words.
_ECHO = re.compile(
    r"connection (closed|reset|was) |Connection (closed|reset) by peer|Broken pipe|"
    r"Timed out waiting|timed out after|DistBackendError|DistNetworkError|DistStoreError|"
    r"ncclRemoteError|remote process exited|Socket Timeout",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Record:
    """What a rank wrote about its failure (logs/rankK.failure.json)."""

    rank: int
    phase: str
    type: str
    message: str
    remedy: str
    traceback: str
    exit_code: int
    host: str = ""
    time: float = 0.0

    @property
    def is_echo(self) -> bool:
        """Does it only say that another rank is gone?"""
        return _ECHO.search(f"{self.type}: {self.message}") is not None


def clear_records(logs: Path) -> None:
    """Removes the records of an earlier launch."""
    for path in logs.glob("rank*.failure.json"):
        path.unlink()


def read_records(logs: Path) -> list[Record]:
    """The ranks' records, the cause first; one that is cut short is passed over.

    Causes before echoes (a lost connection), then by time, then by rank.
    """
    found: list[Record] = []
    for path in sorted(logs.glob("rank*.failure.json")):
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found.append(
                Record(
                    rank=int(content.get("rank", 0)),
                    phase=str(content.get("phase") or ""),
                    type=str(content.get("type") or ""),
                    message=str(content.get("message") or ""),
                    remedy=str(content.get("remedy") or ""),
                    traceback=str(content.get("traceback") or ""),
                    exit_code=int(content.get("exit_code") or 1),
                    host=str(content.get("host") or ""),
                    time=float(content.get("time") or 0),
                )
            )
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # its rank died while writing; the log's end is shown anyway
    return sorted(found, key=lambda record: (record.is_echo, record.time, record.rank))


def explain(
    stage: Stage, outcome: Outcome, logs: Path, problem: str = "", absent: Sequence[str] = ()
) -> UserError:
    """The error to raise for a step that did not succeed.

    `problem`: what the artifact's verification said; `absent`: the ranks that left no completion
    marker. A rank's own user error (bad config, missing requirement) is shown alone and keeps its
    exit code.
    """
    records = read_records(logs)
    for record in records:
        if record.exit_code in (2, 3):
            kind = ConfigError if record.exit_code == 2 else RequirementError
            return kind(_with_remedy(f"{stage}: {record.message}", record.remedy))
    output = outcome.output()
    lines = [f"{stage} failed: {ending(outcome.code)}"]
    lines += [f"  | {line}" for line in last_lines(output)]
    recorded = {record.rank for record in records}
    silent = [who for who in absent if int(who.split()[1]) not in recorded]
    if silent:
        lines.append(f"ended before its end, without a word (killed?): {', '.join(silent)}")
    lines += _what_ranks_said(_first_of_each(records))
    if outcome.lost:
        lines.append(f"The driver ended the step: {outcome.lost}.")
    if outcome.code == 0 and problem:
        lines.append(f"it reported success, but its artifact does not verify: {problem}")
    lines.append(f"Remedy: {remedy(stage, outcome, records, output)}")
    lines.append(f"The whole log: {outcome.log}")
    return StepFailed("\n".join(lines))


def _what_ranks_said(records: Sequence[Record]) -> list[str]:
    """The first cause with the end of its traceback, the others with a line each."""
    lines = []
    for number, record in enumerate(records):
        where = f" on {record.host}" if record.host else ""
        phase = f" in {record.phase}" if record.phase else ""
        if number == 0 and record.traceback and not record.is_echo:
            lines.append(f"rank {record.rank}{where}{phase} failed first:")
            if record.remedy == record.message:  # a user's own mistake: the remedy says it all
                lines[-1] = f"{lines[-1]} {record.type}"
                continue
            lines += [f"  {line}" for line in record.traceback.rstrip().splitlines()[-TRACEBACK:]]
        else:
            text = record.message.splitlines()[0] if record.is_echo else record.message
            lines.append(f"rank {record.rank}{where}{phase}: {record.type}: {text}")
    return lines


def ending(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"its processes ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"its processes were ended by {name}"


def remedy(stage: Stage, outcome: Outcome, records: list[Record], output: str) -> str:
    """What to change: known causes by their settings, else what the rank advised."""
    said = _said(records, output)
    killed = was_killed(outcome, records, output)
    if killed or _MEMORY.search(said):
        return memory_remedy(stage, killed)
    for record in records:
        if record.remedy:
            return record.remedy
    if outcome.spread:
        return (
            "look for what ended the ranks named above on their hosts (`dmesg` knows of killed "
            "processes; `rlhf doctor` with the same flags asks every host); the same command "
            "starts the step again"
        )
    if "EADDRINUSE" in said or "Address already in use" in said:
        return "another program took the port meanwhile: run the command again"
    return "see the error above; the same command starts the step again"


def was_killed(outcome: Outcome, records: list[Record], output: str) -> bool:
    """Was one of its processes killed (SIGKILL) from outside?"""
    if outcome.lost:  # by this driver
        return False
    # On several nodes it is the launcher's code, and says nothing of the ranks.
    alone = not outcome.spread and outcome.code == -signal.SIGKILL
    return alone or bool(not _causes(records) and _KILLED.search(output))


def is_memory(outcome: Outcome, records: list[Record], *, killed_counts: bool) -> bool:
    """Did it run out of memory? `killed_counts`: the kernel has killed for memory meanwhile."""
    output = outcome.output()
    return bool(_MEMORY.search(_said(records, output))) or (
        killed_counts and was_killed(outcome, records, output)
    )


def _causes(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if not record.is_echo]


def _said(records: Iterable[Record], output: str) -> str:
    """What the ranks recorded; the log, where the one that failed first left no record (C++ aborts,
    a kill) and the others only tell that it is gone."""
    return "\n".join(f"{record.type}: {record.message}" for record in _causes(records)) or output


def memory_remedy(stage: Stage, killed: bool) -> str:
    """The settings that lower memory, cheapest first."""
    model, engine = stage.model, f"{stage.models[0]}.engine"
    why = (
        "killed from outside (most often: the machine ran out of memory)"
        if killed
        else ("out of memory")
    )
    rollout = f" or {stage.section}.rollout.batch_size" if stage.generates else ""
    return (
        f"{why}. Lower {stage.micro_batch}{rollout} (the optimiser's batch stays the same), set "
        f"{model}.gradient_checkpointing=true, use LoRA ({model}.lora.rank=16), or shard over more "
        f"processes ({stage.zero_flag} 2 or 3, with {engine}.offload=cpu if need be)"
    )


def last_lines(output: str, count: int = TAIL_LINES) -> list[str]:
    """The last lines as a terminal would show them: of a progress line, its last state."""
    shown = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in output.split("\n")]
    return [line for line in shown if line][-count:]


def _first_of_each(records: Iterable[Record]) -> list[Record]:
    firsts: dict[tuple[str, str], Record] = {}
    for record in records:
        firsts.setdefault((record.type, record.message), record)
    return list(firsts.values())


def _with_remedy(message: str, advice: str) -> str:
    return f"{message}\n{advice}" if advice and advice not in message else message
