"""Tokenised rows on disk: KEY.arrow, memory-mapped when read, and KEY.json beside it.

Arrow and JSON only: opening a cache file cannot run code. Each file is written under another name
and renamed; the JSON comes last and has the arrow file's sha256, so that a partial, damaged or
mixed pair is seen and made again. Several processes may write one key: they write the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rlhf.errors import DataError
from rlhf.store import cache_root, private_directory
from rlhf.store.files import fsync_directory

if TYPE_CHECKING:
    import datasets

_BATCH = 1000
_ABANDONED_SECONDS = 3600.0


def data_root(setting: str | None) -> Path:
    """The cache's directory, made if absent with mode 0700.

    Raises RequirementError: it cannot be made, or others than its owner can write there.
    """
    root = Path(setting).expanduser().absolute() if setting else cache_root() / "data"
    return private_directory(root)


def load(root: Path, key: str) -> tuple[datasets.Dataset, dict[str, Any]] | None:
    """The rows and the information stored with them; None if absent or damaged."""
    path = root / f"{key}.arrow"
    try:
        info = json.loads((root / f"{key}.json").read_bytes())
        if _file_sha256(path) != info["arrow_sha256"]:
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise _unusable(root, error) from error
    import datasets  # it takes longer than all else here, and previews need none of it

    return datasets.Dataset.from_file(str(path)), info


def store(root: Path, key: str, columns: dict[str, list[Any]], schema: pa.Schema, info: Any) -> str:
    """Write rows and information; return the arrow file's sha256. Raises DataError."""
    table = pa.table(columns, schema=schema)
    path = root / f"{key}.arrow"
    try:
        with _replacing(path) as temporary:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                writer.write_table(table, max_chunksize=_BATCH)
            digest = _file_sha256(temporary)
        with _replacing(root / f"{key}.json") as temporary:
            temporary.write_text(json.dumps({**info, "arrow_sha256": digest}, indent=1))
        _sweep(root, key)
    except OSError as error:
        raise _unusable(root, error) from error
    return digest


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new sibling to write; flushed to disk and renamed to `path` if all went well."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
        fsync_directory(path.parent)
    finally:
        Path(name).unlink(missing_ok=True)


def _sweep(root: Path, key: str) -> None:
    """Removes what a killed process left of this key; another one may be writing the newer ones."""
    for leftover in root.glob(f".{key}.*"):
        with suppress(FileNotFoundError):
            if leftover.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                leftover.unlink()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _unusable(root: Path, error: Exception) -> DataError:
    return DataError(
        f"data cache {root}: {error}; set data.cache_dir or RLHF_CACHE to a directory that you can "
        "write and that has room"
    )
