"""A model's files, looked at before anything is built from them: what is broken in them, in lines.

No torch: `--dry-run` and `doctor` ask here, and so does every step before it loads a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rlhf.plan.files.config import config_faults, size_faults
from rlhf.plan.files.fault import Fault, read_object
from rlhf.plan.files.tokenizer import TOKENIZERS, tokenizer_faults
from rlhf.plan.files.weights import weight_faults

Part = Literal["tokenizer", "weights"]

__all__ = [
    "TOKENIZERS",
    "Fault",
    "Part",
    "config_faults",
    "model_faults",
    "read_object",
    "size_faults",
    "tokenizer_faults",
    "weight_faults",
]


def model_faults(place: Path, part: Part, *, own_code: bool = False) -> list[Fault]:
    """What is broken in a model's directory; empty: nothing that can be seen without building it.

    Args:
        part: what is going to be read beside config.json.
        own_code: Python files that the model brings are trusted.
    """
    config = read_object(place / "config.json")
    if isinstance(config, Fault):
        return [config]
    look = tokenizer_faults if part == "tokenizer" else weight_faults
    return config_faults(config, own_code=own_code) or list(look(place, config))
