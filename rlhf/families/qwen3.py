"""Qwen3: norms on queries and keys, heads of 128 unless the configuration says otherwise."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf.families import gated
from rlhf.families.family import Family, Saved, Size

_KNOWN = {
    "Qwen/Qwen3-0.6B": (28, 1024, 16, 8, 3072, 151936, True, 40960),
    "Qwen/Qwen3-1.7B": (28, 2048, 16, 8, 6144, 151936, True, 40960),
    "Qwen/Qwen3-4B": (36, 2560, 32, 8, 9728, 151936, True, 40960),
    "Qwen/Qwen3-8B": (36, 4096, 32, 8, 12288, 151936, False, 40960),
    "Qwen/Qwen3-14B": (40, 5120, 40, 8, 17408, 151936, False, 40960),
    "Qwen/Qwen3-32B": (64, 5120, 64, 8, 25600, 151936, False, 40960),
}


def _tiny(size: Size) -> dict[str, Any]:
    return {**gated.tiny(size), "head_dim": size["hidden"] // size["heads"]}


FAMILY = Family(
    model_type="qwen3",
    causal_class="Qwen3ForCausalLM",
    layer_class="Qwen3DecoderLayer",
    shape=partial(gated.shape, head_dim=128, head_norms=True),
    saved=Saved(6, 4, 4, 4, hidden_16=2, query_kv_16=1, frozen=4),
    known=gated.known("qwen3", _KNOWN),
    tiny=_tiny,
    parts=gated.PARTS,
    packing=gated.WITH_HEAD_NORMS,
)
