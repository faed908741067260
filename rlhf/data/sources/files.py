"""Files and directories, on this machine or behind any fsspec URL.

Which rows are held out is said by names: a file or a folder below the given directory called
`test`, `val`, `valid`, `validation`, `eval`, `evaluation` or `dev`, alone or followed by something
that is not a letter (`test-00000-of-00001.parquet`, `val_2.jsonl`). If there are both validation
and test files, the validation files serve and the test files are left alone. Files that are held
out with nothing to train on beside them become training data: `open_data_sets` says when.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rlhf.config.limits import LimitsConfig
from rlhf.config.schema import DataConfig
from rlhf.data.sources.base import BadRow, DataSet, Part, Row, as_data_error
from rlhf.data.sources.formats import READERS
from rlhf.data.sources.limits import check_rows, in_file
from rlhf.data.sources.listing import left_out_note, listed, refuse_broken_link, why_left_out
from rlhf.data.sources.packed import compression_of, unpacked
from rlhf.errors import DataError
from rlhf.redact import redact

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_VALIDATION = re.compile(r"(val|valid|validation|eval|evaluation|dev)(?![a-z])", re.IGNORECASE)
UNUSED = "test files, because there are validation files"
_TEST = re.compile(r"test(?![a-z])", re.IGNORECASE)
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_REMEDY = "check the path, its permissions and that the file is whole"
KNOWN = ", ".join(READERS)


def open_local(path: str, data: DataConfig) -> DataSet:
    """Open a file or directory. DataError: absent, not a regular file, nothing readable in it."""
    return _open(LocalFileSystem(), os.path.abspath(os.path.expanduser(path)), path, data)


def open_url(path: str, data: DataConfig) -> DataSet:
    """Open what an fsspec URL names. DataError: unknown protocol, absent, unreachable."""
    remedy = "check the URL; protocols such as s3:// need their package (s3fs) and credentials"
    with as_data_error(path, remedy):
        fs, root = fsspec.core.url_to_fs(path)
        return _open(fs, root, path, data)


def _open(fs: Any, root: str, shown: str, data: DataConfig) -> DataSet:
    with as_data_error(shown, _REMEDY):
        if isinstance(fs, LocalFileSystem):
            refuse_broken_link(root)
        if not fs.exists(root):
            raise DataError(f"data path {shown!r}: no such file or directory; check data.path")
        if not fs.isdir(root):
            return _single(fs, root, shown, data)
        files = listed(fs, root)
    prefix = root.rstrip("/") + "/"
    roles: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    for name in filter(_readable, files):
        relative = name.removeprefix(prefix)
        if why := why_left_out(fs, name, prefix, set(files)):
            left_out.setdefault(why, []).append(relative)
        else:
            roles[name] = role_of(relative)
    if "validation" in roles.values() and "test" in roles.values():
        unused = [name for name, role in roles.items() if role == "test"]
        left_out[UNUSED] = [name.removeprefix(prefix) for name in unused]
        roles = {name: role for name, role in roles.items() if role != "test"}
    notes = tuple(left_out_note(shown, why, names) for why, names in left_out.items())
    if not roles:
        why = f"no file there ends in one of {KNOWN}"
        raise DataError("; ".join([f"data path {shown!r}: {why}", *notes]))
    parts = tuple(_part(fs, name, role != "train", data) for name, role in roles.items())
    return DataSet(prefix, parts, notes)


def _single(fs: Any, root: str, shown: str, data: DataConfig) -> DataSet:
    local = isinstance(fs, LocalFileSystem)
    if not (os.path.isfile(root) if local else fs.info(root)["type"] in ("file", "link")):
        raise DataError(
            f"data path {shown!r}: not a regular file (a pipe or device?); rows are read more than "
            "once, so copy them to a file first"
        )
    folder, _, name = root.rpartition("/")
    if suffix_of(name) not in READERS:
        raise DataError(f"data path {shown!r}: its name must end in one of {KNOWN}")
    return DataSet(folder + "/", (_part(fs, root, role_of(name) != "train", data),))


def _readable(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base not in _NOT_ROWS and suffix_of(base) in READERS


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


def _part(fs: Any, name: str, held_out: bool, data: DataConfig) -> Part:
    shown = name if isinstance(fs, LocalFileSystem) else redact(fs.unstrip_protocol(name))
    with as_data_error(shown, _REMEDY), fs.open(name, "rb") as stream:
        fingerprint, packed = looked_over(stream, suffix_of(name), shown, data.limits)
    rows = functools.partial(_rows, fs, name, shown, packed, data.limits)
    return Part(shown, held_out, fingerprint, rows)


def looked_over(
    stream: Any, suffix: str, shown: str, limits: LimitsConfig
) -> tuple[str, str | None]:
    """Hash of a file's content and format, and its compression.

    DataError: `compression_of`'s; more bytes, or more lines of one row each, than the limits.
    """
    first = stream.read(1 << 20)
    packed = compression_of(first, shown)
    digest = hashlib.sha256(suffix.encode() + first)
    size, rows = len(first), first.count(b"\n")
    for block in iter(functools.partial(stream.read, 1 << 20), b""):
        digest.update(block)
        size, rows = size + len(block), rows + block.count(b"\n")
        in_file(shown, size, limits, "in it")
    if suffix in (".jsonl", ".ndjson") and packed is None:
        check_rows(shown, rows, limits)
    return digest.hexdigest(), packed


def _rows(
    fs: Any, name: str, shown: str, packed: str | None, limits: LimitsConfig
) -> Iterator[tuple[str, Row | BadRow]]:
    with as_data_error(shown, _REMEDY), fs.open(name, "rb") as stream:
        content = unpacked(stream, packed, shown, limits)
        yield from READERS[suffix_of(name)](content, shown, limits)
