"""One fault of one file: where, what was found, the rule, the remedy; and reading JSON objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

MAX_JSON_BYTES = 200 * 10**6
AGAIN = "copy the file again from where the model comes from"
_SHOWN = 60


@dataclass(frozen=True)
class Fault:
    found: str
    """File, key and value."""
    rule: str
    remedy: str = AGAIN

    def line(self) -> str:
        return f"{self.found} (needed: {self.rule}) -> {self.remedy}"


def shown(value: Any) -> str:
    """A value of a JSON file on one short line."""
    if isinstance(value, (dict, list)):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value):,}"
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


class _Twice(ValueError):
    """A key that is given twice in one object, with two values."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise _Twice(f"{shown(key)} is given twice: {shown(value)}, {shown(found[key])}")
    return found


def read_object(path: Path) -> dict[str, Any] | Fault:
    """The JSON object in a file, or what is wrong with the file."""
    needed = "a JSON object"
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            limit = f"{needed} of at most {MAX_JSON_BYTES // 10**6} MB"
            return Fault(f"{path.name} has {size:,} bytes", limit)
        content = path.read_bytes()
    except FileNotFoundError:
        return Fault(f"{path.name}: no such file", needed, "give a model directory that is whole")
    except OSError as error:
        return Fault(f"{path.name}: {error.strerror or error}", needed)
    if not content.strip():
        return Fault(f"{path.name} is empty", needed)
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        return Fault(f"{path.name} nests too deep", "a JSON object of a few levels")
    except _Twice as error:
        return Fault(f"{path.name}: {error}", "each key once", "take out the wrong one")
    except ValueError as error:
        why = str(error).split(";")[0]
        return Fault(f"{path.name} is not readable as JSON: {why}", needed)
    if not isinstance(value, dict):
        kinds = {list: "a list", str: "text", bool: "a truth value", type(None): "null"}
        return Fault(f"{path.name} holds {kinds.get(type(value), 'a number')}", needed)
    return value


@dataclass(frozen=True)
class Rule:
    """What the value of a key may be. A key that is absent breaks no rule."""

    holds: Callable[[Any], bool]
    text: str


def broken(
    file: str, content: dict[str, Any], rules: dict[str, Rule], remedy: str = AGAIN
) -> Iterator[Fault]:
    """A fault for each key whose value breaks its rule."""
    for key, rule in rules.items():
        if key in content and not rule.holds(content[key]):
            yield Fault(f"{file}: {key} is {shown(content[key])}", rule.text, remedy)


def is_count(value: Any, least: int = 1, most: int = 10**9) -> TypeGuard[int]:
    """A whole number; True and False are none."""
    return type(value) is int and least <= value <= most
