"""Where rows come from, and what happens to rows and files that are broken."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.config.schema import DataConfig
from rlhf.data.sources import SOURCES, kind_of, open_data_sets
from rlhf.errors import DataError
from tests.unit.data_help import gpt2_like, pair, run, write_jsonl

ROWS = [pair(i, prompt=f'é {i},\n"q"') for i in range(3)]


def _csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def _arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _lines(path: Path) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(_lines(path)),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + _lines(path)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(_lines(path))),
    "lines.json": lambda path: path.write_bytes(_lines(path)),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "data.json": lambda path: path.write_text(json.dumps({"data": ROWS})),
    "a.csv": _csv,
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "a.arrow": _arrow_stream,
    "a.feather": _arrow_file,
}


def _read(*paths: object, **settings: Any) -> dict[bool, list[Any]]:
    data = DataConfig(path=[str(path) for path in paths], **settings)
    found: dict[bool, list[Any]] = {False: [], True: []}
    for one in open_data_sets(data):
        for part in one.parts:
            found[part.held_out] += [row for _, row in part.rows()]
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_formats(name: str, tmp_path: Path) -> None:
    """C10: rows from each format, from a file and from memory://."""
    path = tmp_path / name
    WRITERS[name](path)
    assert _read(path)[False] == ROWS
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/{tmp_path.name}/{name}", path.read_bytes())
    assert _read(f"memory://{tmp_path.name}/{name}")[False] == ROWS
    assert _read(f"memory://{tmp_path.name}")[False] == ROWS
    assert _read(path.as_uri())[False] == ROWS


def test_directories(tmp_path: Path) -> None:
    """C10, D1: held-out rows by file or folder name; other files are not rows."""
    write_jsonl(tmp_path / "a/train-00000-of-00001.jsonl", [ROWS[0]])
    write_jsonl(tmp_path / "a/test-00000-of-00001.jsonl", [ROWS[1]])
    write_jsonl(tmp_path / "a/values.jsonl", [ROWS[2]])
    (tmp_path / "a/LICENSE").write_text("free")
    (tmp_path / "a/dataset_info.json").write_text("{}")
    (tmp_path / "a/.hidden.jsonl").write_text("oops")
    assert _read(tmp_path / "a") == {False: [ROWS[0], ROWS[2]], True: [ROWS[1]]}
    for number, folder in enumerate(("train", "val", "test")):
        write_jsonl(tmp_path / "b/data" / folder / "x.jsonl", [ROWS[number]])
    assert _read(tmp_path / "b") == {False: [ROWS[0]], True: [ROWS[1]]}


def test_files_of_one_folder_are_one_data_set(tmp_path: Path) -> None:
    """C10: `train.jsonl test.jsonl` mean the same as their folder, also when given twice."""
    train = write_jsonl(tmp_path / "d/train.jsonl", ROWS[:2])
    test = write_jsonl(tmp_path / "d/test.jsonl", ROWS[2:])
    (folder,) = open_data_sets(DataConfig(path=[str(tmp_path / "d")]))
    (files,) = open_data_sets(DataConfig(path=[str(test), str(train), str(train)]))
    assert files.fingerprint == folder.fingerprint


def test_saved_to_disk(tmp_path: Path) -> None:
    """C10: a directory that `datasets` wrote."""
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "d"))
    assert _read(tmp_path / "d") == {False: ROWS, True: ROWS}


def test_content_not_names(tmp_path: Path) -> None:
    """The fingerprint follows the bytes: not the name, the folder or the time."""
    paths = [write_jsonl(tmp_path / name, ROWS) for name in ("a/x.jsonl", "b/y.jsonl")]
    os.utime(paths[1], (1, 1))
    one, two = (open_data_sets(DataConfig(path=[str(p)]))[0].fingerprint for p in paths)
    assert one == two
    write_jsonl(paths[1], ROWS[:2])
    assert open_data_sets(DataConfig(path=[str(paths[1])]))[0].fingerprint != one


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("sample:courtesy", "sample"),
        ("s3://bucket/x.jsonl", "url"),
        ("/data/absent", "local"),
        ("absent.jsonl", "local"),
        ("Dahoas/rm-static", "hub"),
        ("openai/summarize:comparisons@v1.0", "hub"),
    ],
)
def test_kinds(path: str, kind: str) -> None:
    """C10."""
    assert kind_of(path) == kind
    assert kind in SOURCES


def test_courtesy() -> None:
    """C10: the data that ships with the project has both splits."""
    rows = _read("sample:courtesy")
    assert len(rows[False]) > len(rows[True]) > 0
    assert {"prompt", "chosen", "rejected"} <= set(rows[True][0])
    with pytest.raises(DataError, match="courtesy"):
        _read("sample:curtsy")


class Hub:
    """Stands for `datasets.load_dataset` and remembers what was asked."""

    def __init__(self, **splits: list[dict[str, Any]]) -> None:
        self.splits, self.asked = splits, []  # type: ignore[var-annotated]

    def __call__(self, *args: Any, **kwargs: Any) -> datasets.DatasetDict:
        self.asked.append((args, kwargs))
        if not self.splits:
            raise ConnectionError("Couldn't reach the hub\n")
        made = {name: datasets.Dataset.from_list(rows) for name, rows in self.splits.items()}
        return datasets.DatasetDict(made)


def _hub(monkeypatch: pytest.MonkeyPatch, **splits: list[dict[str, Any]]) -> Hub:
    hub = Hub(**splits)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    return hub


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """C10: id, configuration and revision reach `datasets`; splits are taken by name."""
    hub = _hub(monkeypatch, train=ROWS, test=ROWS[:1])
    assert _read("org/name") == {False: ROWS, True: ROWS[:1]}
    _read("org/name:cfg@v1")
    assert hub.asked == [
        (("org/name", None), {"revision": None}),
        (("org/name", "cfg"), {"revision": "v1"}),
    ]
    assert _read("org/name", hub_eval_split=None)[True] == []
    assert _read("org/name", hub_split="test") == {False: ROWS[:1], True: []}
    with pytest.raises(DataError, match=r"no split 'trian'; it has train, test"):
        _read("org/name", hub_split="trian")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """C10: the client's error becomes one line with the remedy."""
    _hub(monkeypatch)
    with pytest.raises(DataError, match=r"org/name: .*Couldn't reach the hub; .*HF_ENDPOINT"):
        _read("org/name")
    with pytest.raises(DataError, match="nor a hub id"):
        _read("org/na me/x")


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "broken": (b'{"prompt": "x", ', "broken JSON"),
    "deep": (b"[" * 100_000, "broken JSON"),
    "latin1": (b'{"prompt": "caf\xe9"}', "not UTF-8"),
    "surrogate": (b'{"prompt": "\\ud800"}', "not UTF-8"),
    "nul": (b'{"prompt": "a\0b"}', "NUL byte"),
    "escaped nul": (b'{"prompt": "a\\u0000b"}', "NUL byte"),
    "array": (b"[1, 2]", "not a JSON object"),
    "missing": (b'{"chosen": "a"}', "column 'prompt' is missing"),
    "null": (b'{"prompt": null}', "column 'prompt' is missing"),
    "empty": (b'{"prompt": " \\n"}', "column 'prompt' is empty"),
    "number": (b'{"prompt": 3}', "column 'prompt' is int, not text"),
    "answer type": (b'{"prompt": "p", "chosen": {"a": 1}}', "column 'chosen' is dict, not text"),
    "no rejected": (b'{"prompt": "p", "chosen": "a"}', "column 'rejected' is missing"),
    "empty answer": (
        b'{"prompt": "p", "chosen": "a", "rejected": " "}',
        "column 'rejected' is empty, so the row is left out",
    ),
    "equal": (b'{"prompt": "p", "chosen": "a", "rejected": "a"}', "chosen equals rejected"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines_are_counted_and_located(kind: str, tmp_path: Path) -> None:
    """C14: file and line of each kind of bad row; over the limit they stop the run."""
    line, reason = BAD_LINES[kind]
    path = tmp_path / "r.jsonl"
    good = [json.dumps(pair(i)).encode() for i in range(8)]
    path.write_bytes(b"\n".join([*good[:3], line, b"", *good[3:], line]) + b"\n")
    settings: dict[str, Any] = {"split": (0, 1, 0), "eval_fraction": 0}
    cache = tmp_path / "cache"
    data = run(path, gpt2_like(), cache, **settings)
    assert data.report.bad == {reason: (2, [f"{path}:4", f"{path}:11"])}
    assert (data.report.read, data.report.kept) == (10, 8)
    assert any(reason in text and f"{path}:4" in text for text in data.report.lines())
    with pytest.raises(DataError, match=r"2 of 10 rows .*max_bad_rows allows 1") as caught:
        run(path, gpt2_like(), cache, max_bad_rows=1, **settings)
    assert f"{path}:4" in str(caught.value)
    with pytest.raises(DataError):
        run(path, gpt2_like(), tmp_path / "fresh", max_bad_rows=1, **settings)


def test_bad_csv_and_parquet_rows(tmp_path: Path) -> None:
    """C14: column counts, broken quoting and bytes in text columns."""
    lines = b'prompt,chosen,rejected\np1,a,b\np2,a\np\xe9,a,b\n"p3\nq",a,b\n"p"x,a,b\np4,a,b\n'
    (tmp_path / "r.csv").write_bytes(lines)
    settings: dict[str, Any] = {"split": (0, 1, 0), "eval_fraction": 0}
    report = run(tmp_path / "r.csv", gpt2_like(), tmp_path / "c", **settings).report
    name = tmp_path / "r.csv"
    assert report.bad == {
        "wrong number of CSV columns": (1, [f"{name}:3"]),
        "not UTF-8": (1, [f"{name}:4"]),
        "broken CSV": (1, [f"{name}:7"]),
    }
    assert report.kept == 3
    broken = pa.array([b"p1", b"p\xe9"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": broken, "chosen": ["a", "a"], "rejected": ["b", "b"]})
    pq.write_table(table, tmp_path / "r.parquet")
    report = run(tmp_path / "r.parquet", gpt2_like(), tmp_path / "c", **settings).report
    assert report.bad == {"not UTF-8": (1, [f"{tmp_path}/r.parquet: row 2"])}


UNREADABLE: dict[str, bytes] = {
    "cut.json": b'[{"prompt": "p", "chosen": "a", "rejected": "b"},\n{"prompt": ',
    "open.json": b'[{"prompt": "p", "chosen": "a", "rejected": "b"}\n',
    "cut.jsonl.gz": gzip.compress(b'{"prompt": "p"}\n' * 99)[:-9],
    "text.jsonl.gz": b"not gzip at all",
    "a.parquet": b"PAR1 and nothing else",
    "empty.parquet": b"",
    "a.arrow": b"\xff\xff\xff\xff\x10\x00\x00\x00",
    "empty.arrow": b"",
    "empty.jsonl": b"",
    "empty.json": b"",
    "empty.csv": b"",
    "header.csv": b"prompt,chosen,rejected\n",
    "noise.jsonl": b"\x00\xff\xfe" * 50,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unusable_files(name: str, tmp_path: Path) -> None:
    """C14: damage that leaves no rows is a DataError that names the file, never a traceback."""
    path = tmp_path / name
    path.write_bytes(UNREADABLE[name])
    with pytest.raises(DataError) as caught:
        run(path, gpt2_like(), tmp_path / "cache")
    assert str(path) in str(caught.value)


def test_unusable_paths(tmp_path: Path) -> None:
    """C10, C14: what is not there, not a file, of no known kind, or of an unknown protocol."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    cases = {
        f"{tmp_path}/absent.jsonl": "no such file",
        f"{tmp_path}/pipe.jsonl": "not a regular file",
        f"{tmp_path}/empty": "no file there ends in",
        f"{tmp_path}/notes.txt": "must end in",
        "nosuch://x/y.jsonl": "check the URL",
        "memory://absent/y.jsonl": "no such file",
    }
    for path, message in cases.items():
        with pytest.raises(DataError, match=message):
            run(path, gpt2_like(), tmp_path / "cache")


def test_remote_stream_that_cannot_seek(tmp_path: Path) -> None:
    """C10: parquet behind compression or a plain stream is read whole first."""
    path = tmp_path / "a.parquet"
    WRITERS["a.parquet"](path)
    fsspec.filesystem("memory").pipe(
        f"/{tmp_path.name}/a.parquet.gz", gzip.compress(path.read_bytes())
    )
    assert _read(f"memory://{tmp_path.name}/a.parquet.gz")[False] == ROWS
