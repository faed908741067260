"""Issue 5: every file of an artifact and of a checkpoint, damaged in every way: all is detected.

The artifact is a real one (a tiny model with its tokenizer), the cases are generated from a seed.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf.errors import ArtifactError
from rlhf.store import MANIFEST, publish, verify
from rlhf.store.checkpoints import CHECKPOINT, begin, finish, newest_proven, verify_checkpoint
from tests.unit import model_help as help_

SEED = 5
FLIPS = 14


@dataclass(frozen=True)
class Kind:
    """How one kind of directory is made (a second one stands for another run's) and proven."""

    name: str
    record: str
    make: Callable[[Path, int], Path]
    prove: Callable[[Path], object]


def make_artifact(place: Path, number: int) -> Path:
    def write(directory: Path) -> None:
        for part in ("actor", "critic"):
            shutil.copytree(help_.tiny(), directory / part)
            (directory / part / "README.md").write_text(f"{part} of run {number}\n" * 9)
            weights = directory / part / "model.safetensors"
            data = bytearray(weights.read_bytes())
            data[-100:] = bytes([number]) * 100
            weights.write_bytes(data)
        (directory / "notes.txt").touch()

    publish(
        place,
        write,
        kind="ppo",
        step=3,
        parents={"sft": {"path": "x", "id": f"{number:064x}"}},
        data_fingerprint=f"d{number}",
        tokenizer_fingerprint="t",
        config={"seed": number},
        metrics={"loss": 0.5},
    )
    return place / "artifact"


def make_checkpoint(place: Path, number: int) -> Path:
    temporary = begin(place, 12)
    for name in ("actor/state/mp_rank_00_model_states.pt", "rank0.pt", "rank1.pt", "progress.json"):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(random.Random(f"{name}{number}").randbytes(4000))
    return finish(
        temporary,
        place,
        {
            "step": 3,
            "position": 12,
            "world_size": 2,
            "engines": {},
            "settings": {"seed": number},
            "parents": {"sft": f"{number:064x}"},
            "data_fingerprint": f"d{number}",
        },
    )


KINDS = [
    Kind("artifact", MANIFEST, make_artifact, verify),
    Kind("checkpoint", CHECKPOINT, make_checkpoint, verify_checkpoint),
]


def damages(path: Path, other: Path, dice: random.Random) -> Iterator[tuple[str, object]]:
    """(what it is, the bytes to put there, or a function that damages the file)."""
    data = path.read_bytes()
    for _ in range(FLIPS if data else 0):
        position, bit = dice.randrange(len(data)), 1 << dice.randrange(8)
        changed = bytearray(data)
        changed[position] ^= bit
        yield f"bit {bit} of byte {position} flipped", bytes(changed)
    sizes = {0, 1, len(data) // 2, len(data) - 1, *(dice.randrange(len(data) + 1) for _ in "xxxx")}
    for size in sorted(size for size in sizes if 0 <= size < len(data)):
        yield f"cut to {size} bytes", data[:size]
    yield "a byte more", data + b"\0"
    if len(data) > 1 and data != data[::-1]:
        yield "bytes in another order", data[::-1]
    yield "zeros of the same size", bytes(len(data)) if data.strip(b"\0") else data + b"0"
    if other.read_bytes() != data:
        yield "another run's", other.read_bytes()
    yield "removed", Path.unlink
    yield "renamed", lambda p: p.rename(p.with_name(p.name + ".bak"))
    yield "a directory in its place", lambda p: (p.unlink(), p.mkdir())
    yield "a link to the same bytes", lambda p: (p.rename(p.parent / "x"), p.symlink_to("x"))
    yield "a pipe", lambda p: (p.unlink(), os.mkfifo(p))
    yield "an extra file beside it", lambda p: (p.parent / "extra.bin").touch()
    yield "an extra folder's file", lambda p: _extra_folder(p.parent)


def _extra_folder(directory: Path) -> None:
    (directory / "more").mkdir()
    (directory / "more" / "x").touch()


def put_back(good: Path, directory: Path) -> None:
    shutil.rmtree(directory)
    shutil.copytree(good, directory)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_all_damage_is_detected(kind: Kind, tmp_path: Path) -> None:
    """100%, each as an ArtifactError that names the directory; nothing else is raised."""
    directory = kind.make(tmp_path / "one", 1)
    other = kind.make(tmp_path / "two", 2)
    good = tmp_path / "good"
    shutil.copytree(directory, good)
    dice = random.Random(SEED)
    names = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
    assert Path(kind.record) in names
    cases, missed = 0, []
    for name in names:
        for what, damage in damages(good / name, other / name, dice):
            if isinstance(damage, bytes):
                (directory / name).write_bytes(damage)
            else:
                damage(directory / name)  # type: ignore[operator]
            cases += 1
            message = None
            try:
                kind.prove(directory)
            except ArtifactError as error:
                message = str(error)
            if message is None or str(directory) not in message:
                missed.append(f"{name}: {what}: {message}")
            put_back(good, directory)
    kind.prove(directory)
    print(f"{kind.name}: {cases} damages, {cases - len(missed)} detected")
    assert cases > 100
    assert missed == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_files_exchanged_with_one_another(kind: Kind, tmp_path: Path) -> None:
    """Of equal size or not, within the directory or with another run's, also several at once."""
    directory, other = kind.make(tmp_path / "one", 1), kind.make(tmp_path / "two", 2)
    good = tmp_path / "good"
    shutil.copytree(directory, good)
    names = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
    pairs = [(a, b) for a in names for b in names if a < b]
    for a, b in pairs:
        first, second = (good / a).read_bytes(), (good / b).read_bytes()
        if first == second:
            continue
        (directory / a).write_bytes(second)
        (directory / b).write_bytes(first)
        with pytest.raises(ArtifactError):
            kind.prove(directory)
        (directory / a).write_bytes(first)
        (directory / b).write_bytes(second)
    kind.prove(directory)
    # All files but the record are the other run's, and the other way round.
    for name in names:
        if str(name) != kind.record:
            shutil.copyfile(other / name, directory / name)
    with pytest.raises(ArtifactError):
        kind.prove(directory)
    put_back(good, directory)
    shutil.copyfile(other / kind.record, directory / kind.record)
    with pytest.raises(ArtifactError):
        kind.prove(directory)


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path) -> None:
    """The one before it serves; the damaged one is named for the console."""
    make_checkpoint(tmp_path, 1)
    older = tmp_path / "step-00000012"
    newer = tmp_path / "step-00000024"
    shutil.copytree(older, newer)  # under another position's name: it is not that checkpoint
    found, skipped = newest_proven(tmp_path)
    assert found is not None
    assert found[0] == older
    assert len(skipped) == 1
    assert str(newer) in skipped[0]
    (older / "rank0.pt").write_bytes(b"")
    assert newest_proven(tmp_path)[0] is None
