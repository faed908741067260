"""Files and directories, on this machine or behind any fsspec URL.

Which rows are held out is said by names: a file or a folder below the given directory called
`test`, `val`, `valid`, `validation`, `eval`, `evaluation` or `dev`, alone or followed by something
that is not a letter (`test-00000-of-00001.parquet`, `val_2.jsonl`). If there are both validation
and test files, the validation files serve and the test files are left alone.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rlhf.config.schema import DataConfig
from rlhf.data.sources.base import BadRow, DataSet, Part, Row, as_data_error
from rlhf.data.sources.formats import READERS
from rlhf.errors import DataError
from rlhf.redact import redact

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_VALIDATION = re.compile(r"(val|valid|validation|eval|evaluation|dev)(?![a-z])", re.IGNORECASE)
_TEST = re.compile(r"test(?![a-z])", re.IGNORECASE)
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_REMEDY = "check the path, its permissions and that the file is whole"
KNOWN = ", ".join(READERS)


def open_local(path: str, data: DataConfig) -> DataSet:
    """Open a file or directory. DataError: absent, not a regular file, nothing readable in it."""
    return _open(LocalFileSystem(), os.path.abspath(os.path.expanduser(path)), path)


def open_url(path: str, data: DataConfig) -> DataSet:
    """Open what an fsspec URL names. DataError: unknown protocol, absent, unreachable."""
    remedy = "check the URL; protocols such as s3:// need their package (s3fs) and credentials"
    with as_data_error(path, remedy):
        fs, root = fsspec.core.url_to_fs(path)
        return _open(fs, root, path)


def _open(fs: Any, root: str, shown: str) -> DataSet:
    with as_data_error(shown, _REMEDY):
        if not fs.exists(root):
            raise DataError(f"data path {shown!r}: no such file or directory; check data.path")
        if not fs.isdir(root):
            return _single(fs, root, shown)
        found = fs.find(root, detail=True)
        files = [name for name, info in sorted(found.items()) if info["type"] == "file"]
    prefix = root.rstrip("/") + "/"
    roles = {name: role_of(name.removeprefix(prefix)) for name in files if _readable(name)}
    if not roles:
        raise DataError(f"data path {shown!r}: no file there ends in one of {KNOWN}")
    unused = "test" if "validation" in roles.values() else None
    kept = {name: role for name, role in roles.items() if role != unused}
    return DataSet(prefix, tuple(_part(fs, name, role != "train") for name, role in kept.items()))


def _single(fs: Any, root: str, shown: str) -> DataSet:
    if fs.info(root)["type"] != "file":
        raise DataError(
            f"data path {shown!r}: not a regular file (a pipe or device?); rows are read more than "
            "once, so copy them to a file first"
        )
    folder, _, name = root.rpartition("/")
    if suffix_of(name) not in READERS:
        raise DataError(f"data path {shown!r}: its name must end in one of {KNOWN}")
    return DataSet(folder + "/", (_part(fs, root, role_of(name) != "train"),))


def _readable(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base not in _NOT_ROWS and not base.startswith(".") and suffix_of(base) in READERS


def suffix_of(name: str) -> str:
    """The format's suffix, in small letters, without that of a compression."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in _COMPRESSED else suffix


def role_of(relative: str) -> str:
    """`train`, `validation` or `test`, by the names of a file and of the folders that it is in."""
    names = relative.split("/")
    if any(_TEST.match(name) for name in names):
        return "test"
    return "validation" if any(_VALIDATION.match(name) for name in names) else "train"


def _part(fs: Any, name: str, held_out: bool) -> Part:
    shown = name if isinstance(fs, LocalFileSystem) else redact(fs.unstrip_protocol(name))
    with as_data_error(shown, _REMEDY), fs.open(name, "rb") as stream:
        digest = hashlib.sha256(suffix_of(name).encode())
        for block in iter(functools.partial(stream.read, 1 << 20), b""):
            digest.update(block)
    return Part(shown, held_out, digest.hexdigest(), functools.partial(_rows, fs, name, shown))


def _rows(fs: Any, name: str, shown: str) -> Iterator[tuple[str, Row | BadRow]]:
    with as_data_error(shown, _REMEDY), fs.open(name, "rb", compression="infer") as stream:
        yield from READERS[suffix_of(name)](_seekable(stream), shown)


def _seekable(stream: BinaryIO) -> BinaryIO:
    """Parquet and arrow jump about; a stream that cannot is read whole."""
    return stream if stream.seekable() else io.BytesIO(stream.read())
