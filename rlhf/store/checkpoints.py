"""Checkpoints of an unfinished step: each appears whole or not at all, and is proven before use.

`stepN/resume/step-00000012/` holds what the ranks wrote and, last, CHECKPOINT.json with the hash of
every file. A directory with another name there is what a killed process left.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf.config.migrate import SCHEMA_VERSION, changes
from rlhf.errors import ArtifactError
from rlhf.store.files import disk_errors, fsync_directory, hash_files, open_regular, remove, scan
from rlhf.store.jsonio import fingerprint, jsonable, pretty_json
from rlhf.store.manifest import FileRecord, Sha256, path_problem
from rlhf.store.publishing import library_versions, seal

CHECKPOINT = "CHECKPOINT.json"
_NAME = re.compile(r"step-(\d{8,})")


class EngineShape(BaseModel):
    """What a DeepSpeed engine's state is of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    zero_stage: int
    dtype: str
    trained_parameters: int

    def same_weights(self, other: EngineShape) -> bool:
        """Can one read what the other wrote? ZeRO stages are converted."""
        ours, theirs = (one.model_dump(exclude={"zero_stage"}) for one in (self, other))
        return ours == theirs


class Checkpoint(BaseModel):
    """What a checkpoint is, what it belongs to, and the hash of every file in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    format: Literal[1] = 1
    schema_version: Annotated[int, Field(ge=0)] = 0
    """Which release's `settings` these are: rlhf/config/migrate.py."""
    id: Sha256
    created: str
    step: Annotated[int, Field(ge=1)]
    position: Annotated[int, Field(ge=0)]
    """Optimiser steps (step 3: iterations) that are done."""
    world_size: Annotated[int, Field(ge=1)]
    engines: dict[str, EngineShape]
    settings: dict[str, Any]
    """Dotted name -> value, of every setting that decides the step's numbers."""
    parents: dict[str, str | None]
    data_fingerprint: str
    data_sources: list[dict[str, Any]] | None = None
    """As in the manifest."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl when this was written."""
    versions: dict[str, str]
    files: dict[str, FileRecord]


def begin(resume: Path, position: int) -> Path:
    """An empty directory, beside the checkpoints, for a new one; removes what killed ones left."""
    with disk_errors(resume):
        resume.mkdir(parents=True, exist_ok=True)
        clean(resume)
        temporary = resume / f".step-{position:08}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        temporary.mkdir()
    return temporary


def finish(temporary: Path, resume: Path, content: Mapping[str, Any]) -> Path:
    """Seals what was written and gives it its name; returns the checkpoint's directory.

    `content`: the fields of Checkpoint but id, created, versions and files. Raises ArtifactError
    (disk full, ...), with the checkpoints that were there before intact.
    """
    record = jsonable(
        {
            "format": 1,
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": library_versions(),
            **content,
        }
    )
    destination = resume / f"step-{record['position']:08}"
    with disk_errors(destination):
        try:
            seal(temporary, record, CHECKPOINT, Checkpoint)
            if os.path.lexists(destination):  # one that does not verify: its place is needed
                remove(destination)
            os.rename(temporary, destination)
        finally:
            remove(temporary)
        fsync_directory(resume)
    return destination


def clean(resume: Path) -> None:
    """Removes what killed processes left beside the checkpoints."""
    for path in resume.glob(".step-*.tmp-*"):
        remove(path)


def prune(resume: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for path in checkpoints(resume)[:-keep]:
        remove(path)


def checkpoints(resume: Path) -> list[Path]:
    """The checkpoints by name, oldest first; whether they are whole is not looked at."""
    if not resume.is_dir():
        return []
    found = [path for path in resume.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def newest(resume: Path) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint by name whose record is intact (quick: other files are not read)."""
    for path in reversed(checkpoints(resume)):
        try:
            return path, read_checkpoint(path)
        except ArtifactError:
            continue
    return None


def newest_proven(resume: Path) -> tuple[tuple[Path, Checkpoint] | None, list[str]]:
    """(the newest checkpoint that verifies, or None; why newer ones were passed over)."""
    skipped: list[str] = []
    for path in reversed(checkpoints(resume)):
        try:
            return (path, verify_checkpoint(path)), skipped
        except ArtifactError as error:
            skipped.append(str(error))
    return None, skipped


def read_checkpoint(path: Path) -> Checkpoint:
    """The record, itself intact; the other files are not looked at. Raises ArtifactError."""
    place = path / CHECKPOINT
    try:
        with open(open_regular(place), "rb") as stream:
            raw = stream.read()
        content = json.loads(raw)
        if pretty_json(content).encode("ascii") != raw:
            raise ValueError("its bytes are not those that were written")
        record = Checkpoint.model_validate(content)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no {CHECKPOINT}: it was never finished") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ArtifactError(f"{place}: not a checkpoint's record: {first['msg']}") from error
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise ArtifactError(f"{place}: damaged: {str(error)!a}") from error
    identity = content.pop("id")
    if identity != fingerprint(content):
        raise ArtifactError(f"{place}: changed after it was written")
    for relative in record.files:
        if problem := path_problem(relative):
            raise ArtifactError(f"{place}: the file {relative!a} {problem}")
    if path.name != f"step-{record.position:08}":
        raise ArtifactError(f"{path}: this is the checkpoint of position {record.position}")
    return record


def verify_checkpoint(path: Path) -> Checkpoint:
    """Proves that the directory holds exactly the files that were saved; reads all of them.

    Raises ArtifactError naming the file: absent, partial, corrupt, extra, a link.
    """
    record = read_checkpoint(path)
    try:
        sizes = scan(path)
        sizes.pop(CHECKPOINT)
        for relative, file in record.files.items():
            if sizes.get(relative) != file.size:
                what = "is missing" if relative not in sizes else "has another size"
                raise ArtifactError(f"{path}: {relative!a} {what}")
        if extra := sorted(sizes.keys() - record.files.keys()):
            raise ArtifactError(f"{path}: unexpected file {extra[0]!a}")
        for relative, digest in hash_files(path, sorted(record.files)).items():
            if digest != record.files[relative].sha256:
                raise ArtifactError(f"{path}: {relative!a} is corrupt")
    except OSError as error:
        raise ArtifactError(f"{path}: {error.filename}: {error.strerror}") from error
    return record


def differences(
    record: Checkpoint, *, settings: Mapping[str, Any], parents: Mapping[str, str | None]
) -> tuple[list[str], list[str]]:
    """(why it cannot be gone on from at all, which settings have changed), for a person."""
    fatal = []
    for name in sorted(record.parents.keys() | parents.keys()):
        if record.parents.get(name) != parents.get(name):
            fatal.append(f"its {name} model was another one")
    return fatal, changes(record.settings, jsonable(settings), record.schema_version)


def conversion(record: Checkpoint, world_size: int, engines: Mapping[str, EngineShape]) -> str:
    """What is converted for the present processes and ZeRO stages; "" if nothing is."""

    def told(processes: int, shapes: Mapping[str, EngineShape]) -> str:
        stages = {name: shapes[name].zero_stage for name in engines}
        some = "1 process" if processes == 1 else f"{processes} processes"
        if len(set(stages.values())) == 1:
            return f"{some}, ZeRO {min(stages.values())}"
        return f"{some}, {', '.join(f'{name} ZeRO {stage}' for name, stage in stages.items())}"

    was, now = told(record.world_size, record.engines), told(world_size, engines)
    return "" if was == now else f"checkpoint of {was}, read for {now}"


def refusal(place: Path, fatal: list[str], changed: list[str]) -> str:
    """The sentence for a checkpoint that must not be gone on from unasked; "" if there is none."""
    never = "to start the step again: --resume never"
    if fatal:
        return f"{place} does not fit this run: {'; '.join(fatal)}; or, {never}"
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return (
            f"{place} was made with other settings: {', '.join(changed[:3])}{more}. To go on from "
            f"it with the new ones: --resume always; {never}"
        )
    return ""
