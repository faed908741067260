"""Data that ships with the project: `sample:courtesy`."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterator

from rlhf.config.schema import DataConfig
from rlhf.data.sources.base import BadRow, DataSet, Part, Row, sha256
from rlhf.errors import DataError

SAMPLES: dict[str, str] = {"courtesy": "rlhf.data.courtesy"}


def open_sample(path: str, data: DataConfig) -> DataSet:
    """Open `sample:NAME`. DataError: no such sample."""
    name = path.removeprefix("sample:")
    if name not in SAMPLES:
        raise DataError(f"data path {path!r}: the samples are {', '.join(SAMPLES)}")
    module = importlib.import_module(SAMPLES[name])
    parts = []
    for split in ("train", "test"):
        rows = module.rows(split)
        digest = sha256(json.dumps(rows, sort_keys=True))
        load = functools.partial(_rows, f"{path}[{split}]", rows)
        parts.append(Part(f"{path}[{split}]", split == "test", digest, load))
    return DataSet(path, tuple(parts))


def _rows(name: str, rows: list[Row]) -> Iterator[tuple[str, Row | BadRow]]:
    for number, row in enumerate(rows, 1):
        yield f"{name}: row {number}", row
