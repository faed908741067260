"""Gemma: heads of 256, tied embeddings. Its scaled embeddings need the model's own forward."""

from __future__ import annotations

from functools import partial

from rlhf.families import gated
from rlhf.families.family import Family, Saved

_KNOWN = {
    "google/gemma-2b": (18, 2048, 8, 1, 16384, 256000, True, 8192),
    "google/gemma-7b": (28, 3072, 16, 16, 24576, 256000, True, 8192),
}

FAMILY = Family(
    model_type="gemma",
    causal_class="GemmaForCausalLM",
    layer_class="GemmaDecoderLayer",
    shape=partial(gated.shape, head_dim=256, tied=True),
    saved=Saved(6, 2, 2, 4, hidden_16=4, frozen=2),
    known=gated.known("gemma", _KNOWN),
    parts=gated.PARTS,
)
