"""The header of a GGUF file as a `config.json`: sizes and names, no weights.

Format: gguf.md of the ggml project (github.com/ggml-org/ggml), versions 2 and 3.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.errors import RequirementError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


def gguf_config(path: Path) -> dict[str, Any]:
    """What a GGUF file says of its model, in transformers' names. Raises RequirementError."""
    try:
        with path.open("rb") as stream:
            values, tensors = _header(stream)
    except (OSError, struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
        raise RequirementError(f"{path}: not a readable GGUF file: {error}") from error
    family = str(values.get("general.architecture", ""))

    def of(key: str) -> Any:
        return values.get(f"{family}.{key}")

    config = {
        "model_type": {"gptneox": "gpt_neox"}.get(family, family),
        "num_hidden_layers": of("block_count"),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": of("attention.key_length"),
        "max_position_embeddings": of("context_length"),
        "vocab_size": of("vocab_size") or values.get("tokenizer.ggml.tokens"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",  # what it is converted to (rlhf/models/spec.py)
    }
    renamed = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_positions":
               "max_position_embeddings", "n_head": "num_attention_heads", "n_inner":
               "intermediate_size"}  # fmt: skip
    if family == "gpt2":
        config |= {new: config[old] for new, old in renamed.items()}
    return config


def _header(stream: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    """(metadata; of an array only its length, tensors' names)."""
    if stream.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = _number(stream, "I")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not 2 or 3")
    tensors, entries = _number(stream, "Q"), _number(stream, "Q")
    values = {}
    for _ in range(entries):
        key = _text(stream)
        values[key] = _value(stream, _number(stream, "I"))
    names = set()
    for _ in range(tensors):
        names.add(_text(stream))
        dimensions = _number(stream, "I")
        stream.seek(8 * dimensions + 4 + 8, 1)
    return values, names


def _number(stream: BinaryIO, code: str) -> Any:
    size = struct.calcsize("<" + code)
    return struct.unpack("<" + code, stream.read(size))[0]


def _text(stream: BinaryIO) -> str:
    return stream.read(_number(stream, "Q")).decode()


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(stream)
    if kind != _ARRAY:
        return _number(stream, _SCALARS[kind])
    inner, length = _number(stream, "I"), _number(stream, "Q")
    if inner in (_STRING, _ARRAY):
        for _ in range(length):
            _value(stream, inner)
    else:
        stream.seek(length * struct.calcsize("<" + _SCALARS[inner]), 1)
    return length
