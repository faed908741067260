"""All text of a data set, for training a tokenizer on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.config.schema import DataConfig
from rlhf.data.sources import BadRow, open_data_sets

_COLUMNS = ("prompt", "response", "chosen", "rejected", "messages")


def texts(data: DataConfig) -> Iterator[str]:
    """Every text in the columns that the steps read, in the order of the rows."""
    columns = [data.columns.get(name, name) for name in _COLUMNS]
    for one in open_data_sets(data):
        for part in one.parts:
            for _, row in part.rows():
                if isinstance(row, BadRow):
                    continue
                for column in columns:
                    yield from _strings(row.get(column))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item.get("content") if isinstance(item, dict) else item)
