"""A file behind an http or https address, signed links (`...jsonl?X-Amz-Signature=...`) included.

It is fetched once into an unnamed temporary file: nothing of it stays, and the address appears
nowhere with its signature.
"""

from __future__ import annotations

import functools
import tempfile
import urllib.request
from collections.abc import Iterator
from typing import IO
from urllib.parse import unquote, urlsplit

from rlhf.config.limits import LimitsConfig
from rlhf.config.schema import DataConfig
from rlhf.data.sources.base import BadRow, DataSet, Part, Row, as_data_error
from rlhf.data.sources.files import KNOWN, looked_over, role_of, suffix_of
from rlhf.data.sources.formats import READERS
from rlhf.data.sources.limits import in_file
from rlhf.data.sources.packed import unpacked
from rlhf.errors import DataError
from rlhf.redact import redact

TIMEOUT_SECONDS = 60.0
_REMEDY = "check the address and the network; a signed link may have expired: sign it again"


def open_http(path: str, data: DataConfig) -> DataSet:
    """Fetch one file. DataError: unreachable, refused, or of no known kind."""
    shown = redact(path)
    name = unquote(urlsplit(path).path)
    suffix = suffix_of(name)
    if suffix not in READERS:
        raise DataError(f"data path {shown!r}: its name must end in one of {KNOWN}")
    with as_data_error(shown, _REMEDY):
        stream = _fetched(path, data.limits)
        fingerprint, packed = looked_over(stream, suffix, shown, data.limits)
    folder, _, base = name.rpartition("/")
    held_out = role_of(base) != "train"
    rows = functools.partial(_rows, stream, packed, suffix, shown, data.limits)
    part = Part(shown, held_out, fingerprint, rows)
    return DataSet(f"{urlsplit(path).scheme}://{urlsplit(path).netloc}{folder}/", (part,))


def _fetched(path: str, limits: LimitsConfig) -> IO[bytes]:
    """The body in a temporary file. DataError: it is cut, or larger than `limits.file_gb`."""
    stream = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as its Part
    with urllib.request.urlopen(path, timeout=TIMEOUT_SECONDS) as answer:
        expected = answer.headers.get("Content-Length")
        in_file(redact(path), int(expected or 0), limits, "by its Content-Length")
        while block := answer.read(1 << 20):
            in_file(redact(path), stream.tell() + len(block), limits, "came, and more was coming")
            stream.write(block)
    if expected is not None and stream.tell() != int(expected):
        raise DataError(
            f"{redact(path)}: {stream.tell()} of {expected} bytes came: the connection broke; "
            "run the command again"
        )
    stream.seek(0)
    return stream


def _rows(
    stream: IO[bytes], packed: str | None, suffix: str, shown: str, limits: LimitsConfig
) -> Iterator[tuple[str, Row | BadRow]]:
    with as_data_error(shown, _REMEDY):
        stream.seek(0)
        yield from READERS[suffix](unpacked(stream, packed, shown, limits), shown, limits)
