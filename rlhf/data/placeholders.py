"""Texts with `{name}` in them: `data.prompt_format` and `data.response_format`."""

from __future__ import annotations

import string

from rlhf.data.sources.base import BadRow, Row
from rlhf.errors import ConfigError

Parsed = list[tuple[str, str | None]]


def parse(text: str, setting: str) -> Parsed:
    """(literal, field) pairs of a format text; only plain `{name}` fields. Raises ConfigError."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"data.{setting} {text!r}: {error}; write braces as {{{{ }}}}") from error
    for _, name, spec, conversion in parsed:
        if name == "" or spec or conversion:
            raise ConfigError(f"data.{setting} {text!r}: fields are column names, {{name}}")
    return [(literal, name) for literal, name, _, _ in parsed]


def fields(parsed: Parsed) -> list[str]:
    """The names in it."""
    return [name for _, name in parsed if name is not None]


def fill(parsed: Parsed, row: Row) -> str:
    """The text with the row's values. Raises BadRow: a column is missing or no text."""
    out = []
    for literal, name in parsed:
        out.append(literal)
        if name is None:
            continue
        value = row.get(name)
        if value is None:
            raise BadRow(f"column {name!r} is missing")
        if not isinstance(value, str):
            raise BadRow(f"column {name!r} is {type(value).__name__}, not text")
        out.append(value)
    return "".join(out)
