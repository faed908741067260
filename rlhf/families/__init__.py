"""Model families: one file for each, with everything that is special about it.

A new family is a file with its FAMILY, and its line in `_ALL`. The planner, the tiny models, the
layers that compute only what is needed and the packed forward read it; a family without a row, or
with fields left out, still trains through transformers' own code.
"""

from __future__ import annotations

from typing import Any

from rlhf.errors import ConfigError
from rlhf.families import (
    bloom,
    gemma,
    gemma2,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    opt,
    phi,
    qwen2,
    qwen3,
    scaled,
)
from rlhf.families.family import (
    TINY_SIZE,
    TINY_VOCAB,
    Family,
    LogitScale,
    Packing,
    Parts,
    Saved,
    Size,
)
from rlhf.families.shape import Config, Linear, ModelShape

_ALL = (llama, opt, gpt2, gpt_neox, qwen3, gemma2, bloom, phi, mistral, qwen2, gemma)

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (*(module.FAMILY for module in _ALL), *scaled.FAMILIES)
}
"""`model_type` in config.json -> what is special about it."""

TINY_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.tiny)
"""What `tiny:FAMILY` can name."""


def tiny_settings(family: str, size: Size = TINY_SIZE) -> dict[str, Any]:
    """Settings of the configuration of `tiny:FAMILY`, its model type among them.

    Raises ConfigError: there is no such tiny model.
    """
    found = FAMILIES.get(family)
    if found is None or found.tiny is None:
        raise ConfigError(
            f"tiny:{family}: no such family; choose one of {', '.join(TINY_FAMILIES)}, "
            "e.g. step1.model.name=tiny:llama"
        )
    return {"model_type": family, "tie_word_embeddings": True, **found.tiny(size)}


__all__ = [
    "FAMILIES",
    "TINY_FAMILIES",
    "TINY_SIZE",
    "TINY_VOCAB",
    "Config",
    "Family",
    "Linear",
    "LogitScale",
    "ModelShape",
    "Packing",
    "Parts",
    "Saved",
    "Size",
    "tiny_settings",
]
