"""Where rows come from: one table of sources, and the rule that says which one a path means."""

from __future__ import annotations

import os
from collections.abc import Callable

from rlhf.config.schema import DataConfig
from rlhf.data.sources.base import BadRow, DataSet, Part, Row
from rlhf.data.sources.files import READERS, open_local, open_url
from rlhf.data.sources.http import open_http
from rlhf.data.sources.hub import open_hub
from rlhf.data.sources.sample import open_sample

__all__ = ["SOURCES", "BadRow", "DataSet", "Part", "Row", "kind_of", "open_data_sets"]

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
    parts: dict[str, dict[str, Part]] = {}
    for path in data.path:
        found = SOURCES[kind_of(path)](path, data)
        for part in found.parts:
            parts.setdefault(found.name, {})[part.name] = part
    sets = [DataSet(name, tuple(group.values())) for name, group in parts.items()]
    return sorted(sets, key=lambda one: one.fingerprint)
