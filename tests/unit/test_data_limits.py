"""Issue 11: an endless body, a small parquet of millions of rows, a line of gigabytes, zip bombs:
refused in one line that names limit and setting, before memory or disk are full."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from rlhf.config.limits import LimitsConfig
from rlhf.config.resolve import decisive
from rlhf.config.schema import DataConfig, RunConfig
from rlhf.data.sources import open_data_sets
from rlhf.data.sources.formats import READERS
from rlhf.data.sources.packed import _Zstandard
from rlhf.errors import DataError
from rlhf.stages import SFT
from tests.unit.data_help import gpt2_like, pair, run, write_jsonl

MB = 10**6


def read(path: object, **limits: Any) -> list[Any]:
    data = DataConfig(path=[str(path)], limits=LimitsConfig(**limits))
    return [row for one in open_data_sets(data) for part in one.parts for _, row in part.rows()]


def refusal(path: object, **limits: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Endless(io.RawIOBase):
    """Zeros (or whatever) without end; it knows how much was read."""

    def __init__(self, block: bytes = b"x" * 1024) -> None:
        self.block, self.given = block, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), len(self.block))
        buffer[:size] = self.block[:size]
        self.given += size
        if self.given > 300 * MB:
            raise AssertionError("it was read on and on")
        return size


@pytest.fixture
def server() -> Iterator[tuple[str, list[int]]]:
    """An address whose body never ends (/endless...) or is promised to be huge (/promised...)."""
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if self.path.startswith("/promised"):
                self.send_header("Content-Length", str(10**13))
            self.end_headers()
            block = b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n' * 4096
            try:
                while sum(sent) < 300 * MB:
                    self.wfile.write(block)
                    sent.append(len(block))
            except OSError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", sent
    httpd.shutdown()
    httpd.server_close()


def test_an_endless_body(server: tuple[str, list[int]]) -> None:
    address, sent = server
    said = refusal(f"{address}/endless.jsonl", file_gb=0.005)
    assert "more than 0.005 GB came" in said
    assert "at most data.limits.file_gb=0.005) -> if the data is meant to be so large, set" in said
    assert sum(sent) < 60 * MB  # what sockets hold


def test_a_promised_size_is_refused_before_it_comes(server: tuple[str, list[int]]) -> None:
    address, sent = server
    said = refusal(f"{address}/promised.jsonl")
    assert "more than 20 GB by its Content-Length (needed: at most data.limits.file_gb=20)" in said
    assert sum(sent) < 60 * MB


def test_a_small_parquet_of_millions_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metadata says how many: no row is decoded."""
    path = tmp_path / "rows.parquet"
    group = pa.table({name: pa.repeat("x", 10**6) for name in ("prompt", "response")})
    with pq.ParquetWriter(path, group.schema) as writer:
        for _ in range(6):
            writer.write_table(group, row_group_size=10**6)
    assert path.stat().st_size < 200_000

    def never(*_: object, **__: object) -> None:
        raise AssertionError("rows were decoded")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", never)
    said = refusal(path)
    assert "6,000,000 rows or more (needed: at most data.limits.rows=5,000,000)" in said


def test_a_parquet_that_unpacks_to_much(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    text = pa.array(["y" * 4 * MB], pa.string())
    pq.write_table(pa.table({"prompt": text}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 0.1 * MB
    assert len(read(path)) == 1
    assert "more than 0.003 GB unpacked, by its own figures" in refusal(path, file_gb=0.003)


def test_an_arrow_file_of_many_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    table = pa.table({"prompt": pa.nulls(10**6)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        for _ in range(7):
            writer.write_table(table)
    assert path.stat().st_size < 10_000
    data = DataConfig(path=[str(path)], limits=LimitsConfig(rows=10**6 - 1))
    (part,) = open_data_sets(data)[0].parts
    with pytest.raises(DataError, match="1,000,000 rows or more"):
        next(part.rows())  # not even the first is made


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_an_endless_line_is_not_held(suffix: str) -> None:
    raw = Endless()
    with pytest.raises(DataError) as caught:
        list(READERS[suffix](io.BufferedReader(raw), "big", LimitsConfig(row_mb=3)))
    assert str(caught.value).startswith(
        "big:1: more than 3 MB in one row (needed: at most data.limits.row_mb=3)"
    )
    assert raw.given < 4 * MB


def test_a_csv_field_of_many_lines_is_not_held(tmp_path: Path) -> None:
    """No line is long; the quoted field is."""
    path = tmp_path / "rows.csv"
    path.write_text('prompt\n"' + "x\n" * 2 * MB)
    assert f"{path}:2: more than 2 MB in one row" in refusal(path, row_mb=2)


def test_a_line_beyond_the_default(tmp_path: Path) -> None:
    """As a file with a hole, which takes no room."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    with path.open("r+b") as stream:
        stream.truncate(70 * MB)
    assert f"{path}:2: more than 64 MB in one row" in refusal(path)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("content", [bytes(6 * MB), b"{}\n" * 2 * MB], ids=["zeros", "rows"])
def test_zip_bombs(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / f"rows.jsonl.{kind}"
    path.write_bytes(PACKERS[kind](content))
    assert path.stat().st_size < 20_000
    said = refusal(path, file_gb=0.002)
    assert f"{path}: more than 0.002 GB unpacked (needed: at most data.limits.file_gb=" in said


def test_a_zstandard_bomb_comes_in_small_pieces(tmp_path: Path) -> None:
    """64 KiB of a file can stand for 2 GB: what is unpacked at once stays small."""
    packer = zstandard.ZstdCompressor().compressobj()
    packed = b"".join(packer.compress(bytes(4 * MB)) for _ in range(60)) + packer.flush()
    assert len(packed) < 64 << 10
    reader, largest = _Zstandard(io.BytesIO(packed), "big"), 0
    while reader.read(1):
        largest = max(largest, len(reader._out))
        reader._out = b""
    assert 0 < largest < 40 * MB


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz", "rows.parquet.gz"])
def test_files_that_are_read_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = b"[" + b" " * 3 * MB + b"]"
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    said = refusal(path, whole_gb=0.002)
    assert "more than 0.002 GB in a file that must be read whole (needed: at most data.lim" in said
    assert "or write it as uncompressed .jsonl or .parquet" in said


def test_rows_of_all_files_count_together(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.json"):
        write_jsonl(tmp_path / name, [pair(i) for i in range(10)])
    assert len(read(tmp_path, rows=30)) == 30
    assert "30 rows or more (needed: at most data.limits.rows=29)" in refusal(tmp_path, rows=29)
    data = DataConfig(path=[str(tmp_path)], limits=LimitsConfig(rows=30))
    (one,) = open_data_sets(data)
    assert [len(list(part.rows())) for part in (*one.parts, *one.parts)] == [10] * 6


def test_lines_are_counted_before_a_row_is_made(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(10)])
    with pytest.raises(DataError, match="10 rows or more"):
        open_data_sets(DataConfig(path=[str(path)], limits=LimitsConfig(rows=9)))


def test_limits_decide_nothing_else(tmp_path: Path) -> None:
    """They are no part of what a checkpoint or a cache of tokenised rows was made with."""
    low = RunConfig(data=DataConfig(limits=LimitsConfig(rows=10)))
    assert decisive(low.model_dump(), SFT) == decisive(RunConfig().model_dump(), SFT)
    path = write_jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(40)])
    caches = []
    for rows in (40, 41):
        run(path, gpt2_like(), tmp_path / "cache", limits=LimitsConfig(rows=rows))
        caches.append(sorted(one.name for one in (tmp_path / "cache").rglob("*.arrow")))
    assert caches[0] == caches[1]
