"""Gemma 2: four norms a layer, capped attention scores and logits, every other layer a window."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf.families import gated
from rlhf.families.family import Family, LogitScale, Saved, Size

_KNOWN = {
    "google/gemma-2-2b": (26, 2304, 8, 4, 9216, 256000, True, 8192),
    "google/gemma-2-9b": (42, 3584, 16, 8, 14336, 256000, True, 8192),
}


def _tiny(size: Size) -> dict[str, Any]:
    head = size["hidden"] // size["heads"]
    return {
        **gated.tiny(size),
        "head_dim": head,
        "query_pre_attn_scalar": head,
        "sliding_window": size["positions"],
    }


FAMILY = Family(
    model_type="gemma2",
    causal_class="Gemma2ForCausalLM",
    layer_class="Gemma2DecoderLayer",
    shape=partial(gated.shape, head_dim=256, norms=4, tied=True),
    saved=Saved(10, 2, 2, 4, hidden_16=8, frozen=4, eager=2, eager_16=4),
    known=gated.known("gemma2", _KNOWN),
    tiny=_tiny,
    parts=gated.PARTS,
    logits=LogitScale("cap", "final_logit_softcapping"),
)
