"""Bytes on disk that a run is going to write, as far as its models' sizes are known here."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from rlhf.config.schema import RunConfig

ARTIFACT_BYTES = 4  # per parameter: fp32
CHECKPOINT_BYTES = 16  # per trained parameter: fp32 master weights, two moments, and the weights
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([mb])(?![a-z])", re.IGNORECASE)


def planned_bytes(config: RunConfig, steps: Sequence[int], models: Iterable[str]) -> int:
    """Artifacts of the steps, and the checkpoints of the one that keeps most of them.

    From parameter counts: the largest of the models stands for each. Step 3 trains two of them. An
    unknown size counts as nothing.
    """
    largest = max((parameters(name) for name in models), default=0)
    trained = {1: 1, 2: 1, 3: 2}
    artifacts = sum(trained[step] for step in steps) * ARTIFACT_BYTES
    kept = config.checkpoint.keep_last + 1  # the new one is written before the oldest goes
    checkpoints = max((trained[step] for step in steps), default=0) * kept * CHECKPOINT_BYTES
    return largest * (artifacts + checkpoints)


def parameters(model: str) -> int:
    """A model's parameters: counted in its files, else read in its name (`opt-1.3b`), else 0."""
    path = Path(model).expanduser()
    if path.is_dir():
        counted = sum(_in_safetensors(file) for file in path.glob("*.safetensors"))
        return counted or sum(file.stat().st_size // 2 for file in path.glob("*.bin"))
    if path.is_file():
        return path.stat().st_size  # GGUF: about a byte for each
    found = _SIZE.search(model.rsplit("/", 1)[-1])
    if found is None:
        return 0
    return int(float(found[1]) * {"m": 10**6, "b": 10**9}[found[2].lower()])


def _in_safetensors(file: Path) -> int:
    """From the header alone: 8 bytes of its length, then JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for size in entry["shape"]:
                count *= size
            total += count
    return total
