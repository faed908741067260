"""Data sets of the Hugging Face hub: `org/name`, `org/name:config`, `org/name@revision`."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from rlhf.config.names import DEFAULT_ENDPOINT
from rlhf.config.schema import DataConfig
from rlhf.data.sources.base import BadRow, DataSet, Part, Row, as_data_error
from rlhf.data.sources.limits import check_rows
from rlhf.errors import DataError

_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")
_REMEDY = (
    "if it is meant to be a file, no such file exists; if it is a hub id, check its spelling, the "
    "network, HF_ENDPOINT (--hf-endpoint) for a mirror and HF_TOKEN for gated data"
)


def open_hub(path: str, data: DataConfig) -> DataSet:
    """Download and open a hub data set. DataError: no such id, no such split, hub unreachable."""
    found = _ID.fullmatch(path)
    if found is None:
        raise DataError(
            f"data path {path!r}: neither a file here, a URL, nor a hub id (`org/name`, "
            "`org/name:config`, `org/name@revision`)"
        )
    import datasets

    _stay_on_a_mirror()
    with as_data_error(path, _REMEDY):
        loaded = datasets.load_dataset(
            found["name"], found["config"], revision=found["revision"] or None
        )
    if data.hub_split not in loaded:
        splits = ", ".join(loaded)
        raise DataError(
            f"{path}: no split {data.hub_split!r}; it has {splits}: set data.hub_split to one"
        )
    for split in {data.hub_split, data.hub_eval_split} & set(loaded):
        check_rows(f"{path}[{split}]", len(loaded[split]), data.limits)
    parts = [_part(path, data.hub_split, False, loaded[data.hub_split])]
    held_out = data.hub_eval_split
    if held_out and held_out != data.hub_split and held_out in loaded:
        parts.append(_part(path, held_out, True, loaded[held_out]))
    return DataSet(path, tuple(parts))


def _stay_on_a_mirror() -> None:
    """With a mirror, `datasets` still asks datasets-server.MIRROR (token included, limit 100 s) and
    counts the download at s3.amazonaws.com."""
    import datasets

    if datasets.config.HF_ENDPOINT != DEFAULT_ENDPOINT:
        datasets.config.USE_PARQUET_EXPORT = False
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def _part(path: str, split: str, held_out: bool, rows: Any) -> Part:
    name = f"{path}[{split}]"
    return Part(name, held_out, rows._fingerprint, functools.partial(_rows, name, rows))


def _rows(name: str, rows: Any) -> Iterator[tuple[str, Row | BadRow]]:
    with as_data_error(name, _REMEDY):
        for number in range(len(rows)):
            yield f"{name}: row {number + 1}", rows[number]
