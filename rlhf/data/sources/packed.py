"""Compressed files, by their first bytes whatever their names say, and pointers to files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Callable
from typing import Any, BinaryIO

from rlhf.config.limits import LimitsConfig
from rlhf.data.sources.limits import Counted
from rlhf.errors import DataError

_POINTER = b"version https://git-lfs.github.com/spec/v1"
# One Zstandard block of 4 bytes can stand for 128 KiB: so much of a file gives 32 MB at most.
_BLOCK = 1 << 10
_ZSTD_WINDOW = 1 << 27  # what the command-line tool takes without a flag

# RFC 1952; the formats' own documents for the others. Zstandard's second is a skippable frame.
_FIRST_BYTES: dict[str, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}


def compression_of(first: bytes, shown: str) -> str | None:
    """The compression of a file that begins with these bytes (16 are enough, 64 for a pointer).

    DataError: it is a Git LFS pointer, or Zstandard without the package that reads it.
    """
    if first.startswith(_POINTER):
        raise DataError(
            f"{shown}: a Git LFS pointer, not the data itself: the repository was cloned without "
            "its large files; run `git lfs pull` in it, or download the file"
        )
    found = next((name for name, start in _FIRST_BYTES.items() if start.match(first)), None)
    if found == "zstd":
        _zstandard(shown)
    return found


def unpacked(stream: Any, compression: str | None, shown: str, limits: LimitsConfig) -> BinaryIO:
    """The stream's content without its compression; it raises where the file is cut, and DataError
    where more comes out than `limits.file_gb`."""
    if compression is None:
        return stream
    if compression == "zstd":
        found: Any = _Zstandard(stream, shown)
    else:
        found = _OPENERS[compression](stream)
    return io.BufferedReader(Counted(found, limits, shown), 1 << 16)


_OPENERS: dict[str, Callable[[Any], Any]] = {
    "gzip": lambda stream: gzip.GzipFile(fileobj=stream),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}


def _zstandard(shown: str) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{shown}: compressed with Zstandard, and the package that reads it is not installed; "
            "pip install zstandard"
        ) from error
    return zstandard


class _Zstandard(io.RawIOBase):
    """All frames of a file; `zstandard`'s own reader ends without an error where one is cut."""

    def __init__(self, stream: Any, shown: str) -> None:
        self._stream = stream
        self._new = _zstandard(shown).ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj
        self._frame: Any = None  # None between frames
        self._raw, self._out = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            self._raw = self._raw or self._stream.read(_BLOCK)
            if not self._raw:
                if self._frame is not None:
                    raise EOFError("the file ends before its last Zstandard frame does")
                return 0
            self._frame = self._frame or self._new()
            self._out = self._frame.decompress(self._raw)
            self._raw = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._out))
        buffer[:size], self._out = self._out[:size], self._out[size:]
        return size
