"""What every data source hands over: parts of rows, each row with its place.

A source's author writes a function from a path to a `DataSet` and names it in `SOURCES`
(`rlhf/data/sources/__init__.py`). It knows nothing of tokenizers, templates or steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlhf.errors import DataError, UserError

Row = dict[str, Any]


class BadRow(Exception):
    """A row that cannot be used; its text is the reason under which it is counted."""


class NoPreference(BadRow):
    """A row whose two answers were rated alike: left out, but nothing is wrong with it."""


@dataclass(frozen=True)
class Part:
    """Rows of one file or of one split.

    `fingerprint` is a hash of the content, not of names or times. `rows()` yields
    (where, row) afresh at each call; a row that cannot be read comes as a `BadRow`.
    """

    name: str
    held_out: bool
    fingerprint: str
    rows: Callable[[], Iterator[tuple[str, Row | BadRow]]]


@dataclass(frozen=True)
class DataSet:
    """Parts that belong together: the held-out ones serve the training ones.

    `notes`: what a person should know of how they were found, such as files that are not read.
    """

    name: str
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hash of the parts' content; the order in which they were found plays no role."""
        parts = sorted(f"{part.held_out:d}{part.fingerprint}" for part in self.parts)
        return sha256("\n".join(parts))


def sha256(text: str) -> str:
    """Hex digest of a text; lone surrogates are allowed."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def as_data_error(name: str, remedy: str) -> Iterator[None]:
    """Turn whatever a reading library raises into a DataError that names the source.

    File systems and the hub client raise errors of their own kinds (botocore, aiohttp, ...), which
    cannot be listed here without importing them; the original stays attached as the cause.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300] or "no further explanation"
        raise DataError(
            f"{name}: cannot be read: {type(error).__name__}: {text}; {remedy}"
        ) from error
