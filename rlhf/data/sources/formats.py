"""Readers, one per file format: a binary stream in, (where, row) out.

A row that is broken by itself comes as a `BadRow` with its line; damage after which the rest of
the file cannot be found (a broken JSON array, a cut parquet file) raises.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.config.limits import LimitsConfig
from rlhf.data.sources.base import BadRow, Row
from rlhf.data.sources.limits import MB, check_rows, in_file, lines, long_row, whole
from rlhf.errors import DataError

Rows = Iterator[tuple[str, Row | BadRow]]
_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"
UNPACKED = "unpacked, by its own figures"


def read_jsonl(stream: BinaryIO, name: str, limits: LimitsConfig) -> Rows:
    """One JSON object per line; blank lines are skipped."""
    for number, line in enumerate(lines(stream, limits, name), 1):
        raw = line.removeprefix(_BOM) if number == 1 else line
        if raw.strip():
            yield f"{name}:{number}", _json_row(raw)


def _json_row(raw: bytes) -> Row | BadRow:
    if b"\0" in raw:
        return BadRow("NUL byte")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, RecursionError):
        return BadRow("broken JSON")
    return _object(value)


def _object(value: Any) -> Row | BadRow:
    return value if isinstance(value, dict) else BadRow("not a JSON object")


def read_json(stream: BinaryIO, name: str, limits: LimitsConfig) -> Rows:
    """An array of objects, an object with such an array under `data` or `rows`, or JSON lines."""
    data = whole(stream, limits, name).removeprefix(_BOM)
    # Bytes that are not UTF-8 survive as lone surrogates: the row that has them is found bad later.
    text = data.decode("utf-8", "surrogateescape")
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        yield from _array(text, start, name)
        return
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        yield from read_jsonl(io.BytesIO(data), name, limits)
        return
    if _skip(text, end) < len(text):
        yield from read_jsonl(io.BytesIO(data), name, limits)
        return
    nested = [value[key] for key in ("data", "rows") if isinstance(value, dict) and key in value]
    rows = nested[0] if nested and isinstance(nested[0], list) else [value]
    for number, row in enumerate(rows, 1):
        yield f"{name}: row {number}", _object(row)


def _array(text: str, start: int, name: str) -> Rows:
    decoder = json.JSONDecoder()
    position = _skip(text, start + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _broken(name, line) from error
        yield f"{name}:{line}", _object(value)
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise _broken(name, line)


def _broken(name: str, line: int) -> DataError:
    return DataError(
        f"{name}:{line}: broken JSON: what follows in the array cannot be found; "
        "mend the file, or write one object per line (.jsonl), where one bad line costs one row"
    )


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def read_csv(stream: BinaryIO, name: str, limits: LimitsConfig) -> Rows:
    """Comma-separated values with a header line; every value is text."""
    # Python's own limit, 128 KiB, is less than a long answer.
    csv.field_size_limit(int(limits.row_mb * MB))
    reader = csv.reader(_csv_lines(stream, name, limits), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error):
                raise long_row(f"{name}:{line}", limits) from error
            yield f"{name}:{line}", BadRow("broken CSV")
            continue
        if header is None:
            header = values
        elif len(values) == len(header):
            yield f"{name}:{line}", dict(zip(header, values, strict=True))
        elif values:
            yield f"{name}:{line}", BadRow("wrong number of CSV columns")


def _csv_lines(stream: BinaryIO, name: str, limits: LimitsConfig) -> Iterator[str]:
    """Lines as text, with their ends; a lone carriage return ends one, too."""
    for number, line in enumerate(lines(stream, limits, name)):
        raw = line if number else line.removeprefix(_BOM)
        yield from io.StringIO(raw.decode("utf-8", "surrogateescape"), newline="")


def read_parquet(stream: BinaryIO, name: str, limits: LimitsConfig) -> Rows:
    """Parquet, row group by row group. What its own figures say is checked before any is read."""
    file = pq.ParquetFile(_seekable(stream, name, limits))
    check_rows(name, file.metadata.num_rows, limits)
    groups = range(file.metadata.num_row_groups)
    in_file(name, sum(file.metadata.row_group(i).total_byte_size for i in groups), limits, UNPACKED)
    return _batches(file.iter_batches(batch_size=1024), name, limits)


def read_arrow(stream: BinaryIO, name: str, limits: LimitsConfig) -> Rows:
    """Arrow IPC: the stream format that `datasets` writes, or the file format (feather)."""
    stream = _seekable(stream, name, limits)
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        file = pa.ipc.open_file(stream)
        return _batches((file.get_batch(i) for i in range(file.num_record_batches)), name, limits)
    return _batches(iter(pa.ipc.open_stream(stream)), name, limits)


def _seekable(stream: BinaryIO, name: str, limits: LimitsConfig) -> BinaryIO:
    """Parquet and arrow jump about; a stream that cannot is read whole."""
    return stream if stream.seekable() else io.BytesIO(whole(stream, limits, name))


def _batches(batches: Iterator[pa.RecordBatch], name: str, limits: LimitsConfig) -> Rows:
    number = 0
    for batch in batches:
        check_rows(name, number + batch.num_rows, limits)
        for index in range(batch.num_rows):
            number += 1
            yield f"{name}: row {number}", _arrow_row(batch.slice(index, 1))


def _arrow_row(row: pa.RecordBatch) -> Row | BadRow:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        return BadRow("not UTF-8")


READERS: dict[str, Callable[[BinaryIO, str, LimitsConfig], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
