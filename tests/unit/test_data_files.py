"""Which files of a data path are read, how they are unpacked, and what is said of the others."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.config.schema import DataConfig, ResolvedStep, RunConfig
from rlhf.data.preview import look
from rlhf.data.sources import DataSet, open_data_sets
from rlhf.errors import DataError
from tests.unit.data_help import CASES, gpt2_like, pair, run, write_jsonl

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def opened(*paths: object) -> list[DataSet]:
    return open_data_sets(DataConfig(path=[str(path) for path in paths]))


def roles(sets: list[DataSet]) -> dict[str, bool]:
    """File name -> held out."""
    return {os.path.basename(part.name): part.held_out for one in sets for part in one.parts}


def numbers(sets: list[DataSet]) -> list[int]:
    """The rows' numbers: `pair(n)` has the prompt `... n ...`, these have a column."""
    rows = (row for one in sets for part in one.parts for _, row in part.rows())
    return sorted(row["n"] for row in rows)  # type: ignore[index]


def lines(*found: int) -> bytes:
    return b"".join(json.dumps({"n": number}).encode() + b"\n" for number in found)


def notes(sets: list[DataSet]) -> list[str]:
    return [note for one in sets for note in one.notes]


# Held out by its name alone


def test_held_out_by_name_alone_is_training_data(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    write_jsonl(path, [pair(i) for i in range(60)])
    for sets in (opened(path), opened(tmp_path)):
        assert roles(sets) == {"test.jsonl": False}
        (note,) = notes(sets)
        assert f"{path}: its name says that its rows are held out" in note
        assert "data.eval_fraction 0.05 of its prompts" in note
    train = run(path, gpt2_like(), tmp_path / "c", split=(0, 1, 0), eval_fraction=0.25)
    held = run(path, gpt2_like(), tmp_path / "c", part="eval", split=(0, 1, 0), eval_fraction=0.25)
    assert (train.report.kept, held.held_out.rows) == (45, 15)
    for one in (train, held):
        assert any("its name says" in line for line in one.report.lines())


def test_beside_training_files_it_stays_held_out(tmp_path: Path) -> None:
    for name in ("d/test.jsonl", "d/train.jsonl", "e/eval.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines(len(name)))
    kept = {"test.jsonl": True, "train.jsonl": False}
    assert roles(opened(tmp_path / "d")) == kept
    assert roles(opened(tmp_path / "d/test.jsonl", tmp_path / "d/train.jsonl")) == kept
    # also where the two lie in different folders
    both = opened(tmp_path / "d/train.jsonl", tmp_path / "e/eval.jsonl")
    assert roles(both) == {"eval.jsonl": True, "train.jsonl": False}
    assert notes(both) == []


@pytest.mark.skipif(not CASES.exists(), reason="../shared/cases/data is not here")
def test_shared_eval_answers(tmp_path: Path) -> None:
    data = run(CASES / "eval_answers.jsonl", gpt2_like(), tmp_path, split=(0, 1, 0))
    assert data.report.kept > 0
    assert "eval_answers.jsonl: its name says" in data.report.lines()[0]


def test_the_preview_shows_its_rows_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "eval_answers.jsonl"
    write_jsonl(path, [pair(i) for i in range(300)])
    found = look([_stage(path)])
    assert found.problems == []
    assert any("its name says" in note for note in found.notes)
    assert found.files == [f"{path}: 300 rows, training"]
    assert f"{path}: the first rows for step 1" in found.stages[0]["lines"]


def _stage(path: Path) -> Any:
    return ResolvedStep(
        step=1,
        run_dir=str(path.parent),
        world_size=1,
        parents={},
        inherited={},
        config=RunConfig(data={"path": [str(path)]}, step1={"model": {"name": "tiny:llama"}}),
    )


# Symlinks


def test_a_snapshot_of_links_is_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "models/snapshots/abc"
    (tmp_path / "models/blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("train.jsonl", "test.jsonl")):
        (tmp_path / f"models/blobs/{number:064x}").write_bytes(lines(number))
        (snapshot / name).symlink_to(f"../../blobs/{number:064x}")
    sets = opened(snapshot)
    assert roles(sets) == {"train.jsonl": False, "test.jsonl": True}
    assert numbers(sets) == [0, 1]
    assert numbers(opened(snapshot / "train.jsonl")) == [0]
    assert numbers(opened(f"file://{snapshot}")) == [0, 1]


def test_a_linked_test_file_and_folder_do_not_vanish(tmp_path: Path) -> None:
    data, away = tmp_path / "data", tmp_path / "away"
    data.mkdir()
    (away / "more").mkdir(parents=True)
    (data / "train.jsonl").write_bytes(lines(1))
    (away / "b.jsonl").write_bytes(lines(2))
    (away / "more/c.jsonl").write_bytes(lines(3))
    (data / "test.jsonl").symlink_to(away / "b.jsonl")
    (data / "part").symlink_to(away / "more")
    (away / "more/circle").symlink_to(data)  # back to where it began
    sets = opened(data)
    assert numbers(sets) == [1, 2, 3]
    assert roles(sets) == {"train.jsonl": False, "test.jsonl": True, "c.jsonl": False}


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [pair(0)])
    link = tmp_path / "test.jsonl"
    link.symlink_to("gone/blob")
    for path in (tmp_path, link):
        with pytest.raises(DataError, match=r"test\.jsonl: a broken link: 'gone/blob'"):
            opened(path)


# Hidden files and caches


def test_hidden_files_are_not_read_and_counted(tmp_path: Path) -> None:
    root = tmp_path / ".cache/data"  # the folder that is asked for may lie in a hidden one
    for number, name in enumerate(
        ("train.jsonl", ".ipynb_checkpoints/test-checkpoint.jsonl", ".cache/x/a.json", ".b.csv")
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(lines(number))
    (root / ".git").mkdir()
    (root / ".git/HEAD").symlink_to("nowhere")
    sets = opened(root)
    assert roles(sets) == {"train.jsonl": False}
    (note,) = notes(sets)
    assert note == (
        f"{root}: 3 not read, hidden files or files in hidden folders: .b.csv, .cache/x/a.json, "
        ".ipynb_checkpoints/test-checkpoint.jsonl"
    )
    assert roles(opened(root / ".b.csv")) == {".b.csv": False}  # asked for by its name
    os.remove(root / "train.jsonl")
    with pytest.raises(DataError, match=r"no file there ends in .*3 not read, hidden"):
        opened(root)


def test_caches_of_datasets_are_not_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"n": number} for number in range(20)])
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path))
    loaded = datasets.load_from_disk(str(tmp_path))["train"]
    loaded.map(lambda row: {"n": row["n"] + 100})
    loaded.filter(lambda row: row["n"] > 10)
    loaded.shuffle(seed=1)
    loaded.map(
        lambda row: {"n": row["n"] + 200}, cache_file_name=f"{tmp_path}/train/cache-my.arrow"
    )
    caches = sorted(path.name for path in (tmp_path / "train").glob("cache-*.arrow"))
    assert len(caches) == 4
    sets = opened(tmp_path)
    assert numbers(sets) == sorted([*range(20), 0])
    (note,) = notes(sets)
    assert "4 not read, caches that `datasets` wrote" in note
    assert all(f"train/{name}" in note for name in caches)


def test_other_files_that_are_not_read_are_said(tmp_path: Path) -> None:
    for number, name in enumerate(("train.jsonl", "val.jsonl", "test.jsonl", "cache-notes.arrow")):
        (tmp_path / name).write_bytes(lines(number))
    pq_rows = pa.Table.from_pylist([{"n": 3}])
    path = str(tmp_path / "cache-notes.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, pq_rows.schema) as writer:
        writer.write_table(pq_rows)
    os.mkfifo(tmp_path / "pipe.jsonl")
    sets = opened(tmp_path)
    assert numbers(sets) == [0, 1, 3]
    assert notes(sets) == [
        f"{tmp_path}: 1 not read, not regular files: pipe.jsonl",
        f"{tmp_path}: 1 not read, test files, because there are validation files: test.jsonl",
    ]


def test_notes_are_those_of_today_not_of_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    (folder / ".hidden").mkdir(parents=True)
    write_jsonl(folder / "train.jsonl", [pair(i) for i in range(30)])
    assert run(folder, gpt2_like(), tmp_path / "c").report.notes == []
    write_jsonl(folder / ".hidden/b.jsonl", [pair(99)])
    again = run(folder, gpt2_like(), tmp_path / "c")
    assert [note for note in again.report.lines() if ".hidden/b.jsonl" in note]


# Compression and pointers


def _zstd(raw: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    packed: bytes = zstandard.ZstdCompressor().compress(raw)
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": _zstd,
}


@pytest.mark.parametrize("kind", PACKERS)
def test_compressed_by_name_and_by_first_bytes(kind: str, tmp_path: Path) -> None:
    pack = PACKERS[kind]
    table = tmp_path / "table"
    pq.write_table(pa.Table.from_pylist([{"n": 5}, {"n": 6}]), table)
    found = {
        f"a.jsonl.{kind}": (pack(lines(*range(50_000))), list(range(50_000))),
        "b.jsonl": (pack(lines(3, 4)), [3, 4]),  # the name says nothing of it
        f"two.jsonl.{kind}": (pack(lines(7)) + pack(lines(8)), [7, 8]),
        f"c.parquet.{kind}": (pack(table.read_bytes()), [5, 6]),
        f"d.csv.{kind}": (pack(b"n\n1\n2\n"), ["1", "2"]),
        f"plain.jsonl.{kind}": (lines(9), [9]),  # named so, but not compressed
        f"other.jsonl.{kind}": (gzip.compress(lines(1)), [1]),
    }
    for name, (raw, expected) in found.items():
        (tmp_path / name).write_bytes(raw)
        assert numbers(opened(tmp_path / name)) == expected, name


@pytest.mark.parametrize("kind", PACKERS)
def test_cut_compressed_files_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(PACKERS[kind](lines(*range(50_000)))[:-3])
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+: cannot be read"):
        numbers(opened(path))


def test_zstandard_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(bytes.fromhex("28b52ffd") + b"and more")
    for path in (tmp_path, tmp_path / "a.jsonl.zst"):
        with pytest.raises(DataError, match=r"a\.jsonl\.zst: .*; pip install zstandard"):
            opened(path)


def test_a_git_lfs_pointer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines(1))
    for name in ("test.parquet", "more.jsonl"):
        (tmp_path / name).write_bytes(POINTER)
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(DataError, match=rf"{name}: a Git LFS pointer.*`git lfs pull`"):
                opened(path)
        os.remove(tmp_path / name)
