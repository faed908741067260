"""The weights' files: whole as far as their headers tell, and inside their directory.

Of safetensors the header is read (https://huggingface.co/docs/safetensors, "Format"): 8 bytes with
its length, JSON with each tensor's dtype, shape and place. Of `.bin` files nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.plan.files.config import parameters
from rlhf.plan.files.fault import AGAIN, Fault, is_count, read_object, shown

# In the order in which transformers looks for them.
SINGLE = ("model.safetensors", "pytorch_model.bin")
_POINTER = b"version https://git-lfs"
_ZIP_END = b"PK\x05\x06"  # of the table's last record, which has 22 bytes and a comment
_MAX_HEADER = 100 * 10**6  # safetensors' own limit
# A configuration may describe so many times the weights that there are: heads that are tied or made
# anew, `.bin` files with more than a byte a number.
_SLACK = 4


@dataclass
class Stored:
    """What the weights' files hold."""

    files: list[Path] = field(default_factory=list)
    numbers: int = 0
    """Of `.bin` files: the bytes, which are more."""


def weight_faults(place: Path, config: Mapping[str, Any]) -> Iterator[Fault]:
    """What is broken in the weights of a directory, and whether they can be those of `config`."""
    stored = Stored()
    faults = list(_looked_over(place, stored))
    yield from faults
    if not faults and stored.files:
        described = parameters(config)
        if described > _SLACK * stored.numbers + 10**6:
            yield Fault(
                f"config.json describes {described:,} parameters or more, its weights' files hold "
                f"{stored.numbers:,} numbers",
                "the sizes of these weights",
                "copy config.json and the weights again, from one model",
            )


def _looked_over(place: Path, stored: Stored) -> Iterator[Fault]:
    for name in SINGLE:
        single, index = place / name, place / f"{name}.index.json"
        if single.exists():
            yield from _one_file(single, stored)
            return
        if index.exists():
            yield from _sharded(place, index, stored)
            return
    if list(place.glob("*.gguf")) or _hub_cache(place):
        return
    needed = "model.safetensors (or its shards and their index), or pytorch_model.bin"
    shards = [*place.glob("*.safetensors"), *place.glob("pytorch_model*.bin")]
    what = "shards of weights without their index" if shards else "no weights"
    yield Fault(f"{what} in the directory", needed, "copy all of its files")


def _sharded(place: Path, index: Path, stored: Stored) -> Iterator[Fault]:
    content = read_object(index)
    if isinstance(content, Fault):
        yield content
        return
    table, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(table, dict) or not table:
        yield Fault(f"{index.name}: weight_map is {shown(table)}", "each weight's file")
        return
    if not isinstance(metadata, dict):
        yield Fault(f"{index.name}: metadata is {shown(metadata)}", "a JSON object")
        return
    first: dict[str, str] = {}
    for weight, file in table.items():
        if not isinstance(file, str):
            yield Fault(f"{index.name}: the file of {shown(weight)} is {shown(file)}", "a name")
            return
        first.setdefault(file, weight)
    for file, weight in sorted(first.items()):
        if why := _leads_out(place, file):
            yield Fault(
                f"{index.name}: the file of {shown(weight)} is {shown(file)}, {why}",
                "files inside the model's directory",
                "copy the weights into the directory, if you trust them",
            )
        elif not (place / file).is_file() and _hub_cache(place):
            continue
        elif not (place / file).is_file():
            yield Fault(f"{index.name}: {shown(file)} is not there", "every file that it names")
        else:
            yield from _one_file(place / file, stored)


def _hub_cache(place: Path) -> bool:
    """A snapshot of a hub's: its files are links to `blobs`, and may not all have come yet."""
    return place.parent.name == "snapshots" and (place.parent.parent / "blobs").is_dir()


def _leads_out(place: Path, file: str) -> str:
    """Why a name in an index does not stay in the directory; "" where it does. The hub's cache
    keeps the content of a snapshot's files in the `blobs` beside it."""
    named = Path(file)
    if "\0" in file:
        return "which is no name"
    if named.is_absolute():
        return "an absolute path"
    if ".." in named.parts:
        return "which leads out of the directory"
    inside = [place.resolve()]
    if _hub_cache(place):
        inside.append(place.resolve().parent.parent / "blobs")
    target = (place / file).resolve()
    if not any(target.is_relative_to(one) for one in inside):
        return f"a link to {target}"
    return ""


def _one_file(file: Path, stored: Stored) -> Iterator[Fault]:
    stored.files.append(file)
    if not file.is_file():
        yield Fault(f"{file.name} is no regular file", "the weights")
        return
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(_POINTER))
    if start == _POINTER:
        found = f"{file.name} is a Git LFS pointer, not the weights"
        yield Fault(found, "the weights", f"`git lfs pull` in {file.parent}")
    elif not size:
        yield Fault(f"{file.name} is empty", "the weights")
    elif file.suffix == ".safetensors":
        yield from _safetensors(file, size, stored)
    else:
        stored.numbers += size
        # torch writes zip files since 1.6; a cut one lacks the table at its end.
        if start.startswith(b"PK") and _ZIP_END not in _last(file, size):
            yield Fault(f"{file.name} is cut off ({size:,} bytes)", "a file of torch.save")


def _last(file: Path, size: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(max(0, size - (1 << 16)))
        return stream.read()


def _safetensors(file: Path, size: int, stored: Stored) -> Iterator[Fault]:
    needed = "a safetensors file that is whole"
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            found = f"{file.name} is no safetensors file, or is cut off ({size:,} bytes)"
            yield Fault(found, needed)
            return
        raw = stream.read(length)
    try:
        tensors = json.loads(raw)
        tensors.pop("__metadata__", None)
        end = 0
        for tensor in tensors.values():
            shape, (first, last) = tensor["shape"], tensor["data_offsets"]
            if not all(is_count(n, 0, 2**63) for n in (*shape, first, last)):
                raise ValueError("a shape or a place that is no number")
            stored.numbers += math.prod(shape)
            end = max(end, last)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        yield Fault(f"{file.name}: its header cannot be read: {shown(str(error))}", needed, AGAIN)
        return
    if 8 + length + end != size:
        found = f"{file.name} has {size:,} bytes, its header describes {8 + length + end:,}"
        yield Fault(found, needed)
