"""Where rows come from: one table of sources, and the rule that says which one a path means."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace

from rlhf.config.schema import DataConfig
from rlhf.data.sources.base import BadRow, DataSet, Part, Row
from rlhf.data.sources.files import READERS, open_local, open_url
from rlhf.data.sources.http import open_http
from rlhf.data.sources.hub import open_hub
from rlhf.data.sources.limits import limited
from rlhf.data.sources.sample import open_sample

__all__ = ["SOURCES", "BadRow", "DataSet", "Part", "Row", "gathered", "kind_of", "open_data_sets"]

SOURCES: dict[str, Callable[[str, DataConfig], DataSet]] = {
    "sample": open_sample,
    "http": open_http,
    "url": open_url,
    "local": open_local,
    "hub": open_hub,
}


def kind_of(path: str) -> str:
    """The key in SOURCES that a path belongs to."""
    if path.startswith("sample:"):
        return "sample"
    if path.startswith(("http://", "https://")):
        return "http"
    if "://" in path:
        return "url"
    looks_local = path.startswith(("/", "./", "../", "~")) or path.endswith("/")
    if looks_local or os.path.splitext(path)[1] in READERS or os.path.exists(path):
        return "local"
    return "hub"


def open_data_sets(data: DataConfig) -> list[DataSet]:
    """Open every path; files named one by one from one folder form one data set.

    So `train.jsonl test.jsonl` mean the same as their folder. The result is ordered by content:
    the order of the paths changes nothing. Raises DataError for a path that cannot be opened.
    """
    counts: dict[str, int] = {}
    opened = (SOURCES[kind_of(path)](path, data) for path in data.path)
    return gathered((limited(one, data.limits, counts) for one in opened), data)


def gathered(opened: Iterable[DataSet], data: DataConfig) -> list[DataSet]:
    """The data sets of all paths: those of one name are one, in the order of their content.

    Where nothing at all would be trained on, what names alone made held out is training data; not
    with `data.eval_fraction` 0, where nothing else could be held out.
    """
    groups: dict[str, DataSet] = {}
    for one in opened:
        known = groups.get(one.name, replace(one, parts=(), notes=()))
        parts = {part.name: part for part in (*known.parts, *one.parts)}
        notes = dict.fromkeys((*known.notes, *one.notes))
        groups[one.name] = replace(known, parts=tuple(parts.values()), notes=tuple(notes))
    sets = list(groups.values())
    if data.eval_fraction and all(part.held_out for one in sets for part in one.parts):
        sets = [_trained(one, data) for one in sets]
    return sorted(sets, key=lambda one: one.fingerprint)


def _trained(data_set: DataSet, data: DataConfig) -> DataSet:
    notes = tuple(
        f"{part.name}: its name says that its rows are held out, but there is no training file "
        f"beside it: it is training data (data.eval_fraction {data.eval_fraction:g} of its prompts "
        "are held out)"
        for part in data_set.parts
    )
    parts = tuple(replace(part, held_out=False) for part in data_set.parts)
    return replace(data_set, parts=parts, notes=(*data_set.notes, *notes))
