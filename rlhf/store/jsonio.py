"""JSON that is always valid JSON, in one canonical form, written atomically."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rlhf.errors import RequirementError
from rlhf.store.files import disk_errors, fsync_directory, open_own


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types: NaN and infinities become the texts that `float()` reads back.

    Takes mappings, sequences, sets (sorted), paths, pydantic models and array scalars (`.item()`).
    Raises TypeError for anything else, since a silent `str()` would hide a mistake.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, BaseModel):
        return jsonable(value.model_dump())
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return [jsonable(item) for item in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return jsonable(value.item())
    raise TypeError(f"{type(value).__name__} does not fit into JSON: {value!r:.80}")


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, ASCII only."""
    return json.dumps(jsonable(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def pretty_json(value: Any) -> str:
    """Also one text per value, for files that people read: sorted keys, indented, ASCII only."""
    return json.dumps(jsonable(value), sort_keys=True, indent=2, allow_nan=False) + "\n"


def fingerprint(value: Any) -> str:
    """sha256 (hex) of the value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def write_json_atomic(path: Path | str, value: Any) -> None:
    """Writes `value` as JSON: readers see the old file or the new one, never a part.

    Raises RequirementError (disk full, read-only directory) with the old file intact.
    """
    write_text_atomic(path, pretty_json(value))


def write_text_atomic(path: Path | str, text: str, mode: int | None = None) -> None:
    """Writes a text (UTF-8) as `write_json_atomic` does; `mode`: the file's permissions."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path, RequirementError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open_own(temporary, "w") as stream:
                stream.write(text)
                stream.flush()
                if mode is not None:
                    os.fchmod(stream.fileno(), mode)
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(path.parent)


def read_json(path: Path | str) -> Any:
    """The value in a JSON file. Raises RequirementError if it is absent or not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise RequirementError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise RequirementError(
            f"{path}: not valid JSON ({error}); delete it, and the command that wrote it "
            "writes it again"
        ) from error
