"""Data sets of the Hugging Face hub: `org/name`, `org/name:config`, `org/name@revision`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from rlhf.config.names import DEFAULT_ENDPOINT
from rlhf.config.schema import DataConfig
from rlhf.data.sources.base import BadRow, DataSet, NoPreference, Part, Row, as_data_error
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
    adapter = None if data.columns or data.prompt_format else ADAPTERS.get(found["name"])
    parts = [_part(path, data.hub_split, False, loaded[data.hub_split], adapter)]
    held_out = data.hub_eval_split
    if held_out and held_out != data.hub_split and held_out in loaded:
        parts.append(_part(path, held_out, True, loaded[held_out], adapter))
    return DataSet(path, tuple(parts))


def _stay_on_a_mirror() -> None:
    """With a mirror, `datasets` still asks datasets-server.MIRROR (token included, limit 100 s) and
    counts the download at s3.amazonaws.com."""
    import datasets

    if datasets.config.HF_ENDPOINT != DEFAULT_ENDPOINT:
        datasets.config.USE_PARQUET_EXPORT = False
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def _part(
    path: str, split: str, held_out: bool, rows: Any, adapter: Callable[[Row], Row] | None
) -> Part:
    name = f"{path}[{split}]"
    return Part(name, held_out, rows._fingerprint, functools.partial(_rows, name, rows, adapter))


def _rows(
    name: str, rows: Any, adapter: Callable[[Row], Row] | None
) -> Iterator[tuple[str, Row | BadRow]]:
    with as_data_error(name, _REMEDY):
        for number in range(len(rows)):
            where = f"{name}: row {number + 1}"
            row: Row | BadRow
            try:
                row = rows[number] if adapter is None else adapter(rows[number])
            except BadRow as bad:
                row = bad
            yield where, row


def _pair(question: str, better: str, worse: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": better}],
        "rejected": [{"role": "assistant", "content": worse}],
    }


def _webgpt(row: Row) -> Row:
    if row["score_0"] == row["score_1"]:
        raise NoPreference("answers rated alike")
    answers = [row["answer_0"], row["answer_1"]]
    if row["score_1"] > row["score_0"]:
        answers.reverse()
    return _pair(row["question"]["full_text"], *answers)


def _shp(row: Row) -> Row:
    answers = [row["human_ref_A"], row["human_ref_B"]]
    if int(row["labels"]) == 0:  # 1: A is preferred, 0: B (the data set's card)
        answers.reverse()
    return _pair(row["history"], *answers)


ADAPTERS: dict[str, Callable[[Row], Row]] = {
    "openai/webgpt_comparisons": _webgpt,
    "stanfordnlp/SHP": _shp,
}
