"""Text cells (of a CSV file) that hold a list or a conversation, as JSON or as Python prints it."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from rlhf.data.shapes.turns import is_turn
from rlhf.data.sources.base import BadRow

_LONGEST, _DEEPEST = 1 << 20, 50
_MESSAGE = re.compile(r"(array\(\s*)?\[?\s*\{\s*['\"](role|from|content|value)['\"]\s*:")


def decode(text: str, column: str) -> Any:
    """The value that the text holds. Raises BadRow: neither JSON nor a Python literal, too big."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > _LONGEST or _depth(text) > _DEEPEST:
        raise BadRow(f"column {column!r}: a cell that is no JSON and too long or nested to read")
    try:
        with warnings.catch_warnings():  # of a backslash that is no escape, which stays one
            warnings.simplefilter("ignore")
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise BadRow(
            f"column {column!r}: a cell is neither JSON nor a Python literal (a printed numpy "
            "array has lost its commas): write the data as JSON lines or parquet"
        ) from None


def _depth(text: str) -> int:
    depth = deepest = 0
    for found in re.finditer(r"[\[({\])}]", text):
        depth += 1 if found[0] in "[({" else -1
        deepest = max(deepest, depth)
    return deepest


def holds_messages(text: Any) -> bool:
    """Whether a cell is a conversation written as text."""
    return isinstance(text, str) and _MESSAGE.match(text.lstrip()) is not None


def holds_list(text: Any) -> bool:
    """Whether a cell that should be a list is one written as text."""
    return isinstance(text, str) and text.lstrip().startswith(("[", "{", "array("))


def is_messages(value: Any) -> bool:
    """Whether it is a conversation: a message, or a list that begins with one."""
    return is_turn(value) or (isinstance(value, list) and bool(value) and is_turn(value[0]))
