"""Limits on what is read (settings `data.limits.*`): bytes as they come, rows before they are kept.

A few bytes can stand for gigabytes: an endless HTTP body, zeros in a zip, a repeated parquet row.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from rlhf.config.limits import LimitsConfig
from rlhf.data.sources.base import BadRow, DataSet, Part, Row
from rlhf.errors import DataError

GB, MB = 10**9, 10**6


def over(name: str, found: str, setting: str, limit: float | str) -> DataError:
    """The error for what is larger than a limit."""
    value = f"{limit:,g}" if isinstance(limit, float) else f"{limit:,}"
    return DataError(
        f"{name}: {found} (needed: at most data.limits.{setting}={value}) -> if the data is meant "
        f"to be so large, set data.limits.{setting}"
    )


def in_file(name: str, size: int, limits: LimitsConfig, what: str) -> None:
    """Raises DataError where a file has more than `file_gb` bytes; `what` says which."""
    if size > limits.file_gb * GB:
        raise over(name, f"more than {limits.file_gb:g} GB {what}", "file_gb", limits.file_gb)


def lines(stream: Any, limits: LimitsConfig, name: str) -> Iterator[bytes]:
    """The lines of a binary stream. DataError: one is longer than `row_mb`; it is never held."""
    longest = int(limits.row_mb * MB)
    for number in range(1, 1 << 62):
        line = stream.readline(longest + 1)
        if len(line) > longest:
            raise long_row(f"{name}:{number}", limits)
        if not line:
            return
        yield line


def long_row(place: str, limits: LimitsConfig) -> DataError:
    return over(place, f"more than {limits.row_mb:g} MB in one row", "row_mb", limits.row_mb)


def whole(stream: Any, limits: LimitsConfig, name: str) -> bytes:
    """All bytes of a stream. DataError: more than `whole_gb`."""
    most = int(limits.whole_gb * GB)
    blocks: list[bytes] = []
    size = 0
    while block := stream.read(1 << 20):
        size += len(block)
        if size > most:
            found = f"more than {limits.whole_gb:g} GB in a file that must be read whole"
            error = over(name, found, "whole_gb", limits.whole_gb)
            raise DataError(f"{error}, or write it as uncompressed .jsonl or .parquet")
        blocks.append(block)
    return b"".join(blocks)


class Counted(io.RawIOBase):
    """A decompressed stream that raises DataError after `file_gb`: no seeking."""

    def __init__(self, stream: Any, limits: LimitsConfig, name: str) -> None:
        self._stream, self._limits, self._name, self._size = stream, limits, name, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(len(buffer))
        self._size += len(block)
        in_file(self._name, self._size, self._limits, "unpacked")
        buffer[: len(block)] = block
        return len(block)


def check_rows(name: str, rows: int, limits: LimitsConfig) -> None:
    """Raises DataError for more than `rows` rows."""
    if rows > limits.rows:
        raise over(name, f"{rows:,} rows or more", "rows", limits.rows)


def limited(data_set: DataSet, limits: LimitsConfig, counts: dict[str, int]) -> DataSet:
    """A data set whose parts raise DataError at the first row too many.

    `counts`: rows of each part so far; shared by the data sets of a run.
    """
    parts = tuple(
        replace(part, rows=partial(_rows, part, limits, counts)) for part in data_set.parts
    )
    return replace(data_set, parts=parts)


def _rows(
    part: Part, limits: LimitsConfig, counts: dict[str, int]
) -> Iterator[tuple[str, Row | BadRow]]:
    others = sum(count for name, count in counts.items() if name != part.name)
    for number, row in enumerate(part.rows(), 1):
        counts[part.name] = max(number, counts.get(part.name, 0))
        if others + number > limits.rows:
            check_rows(part.name, others + number, limits)
        yield row
