"""Mistral: Llama's layers; the packed forward leaves its sliding window to the model."""

from __future__ import annotations

from rlhf.families import gated
from rlhf.families.family import Family

_KNOWN = {"mistralai/Mistral-7B": (32, 4096, 32, 8, 14336, 32000, False, 32768)}

FAMILY = Family(
    model_type="mistral",
    causal_class="MistralForCausalLM",
    layer_class="MistralDecoderLayer",
    shape=gated.shape,
    saved=gated.SAVED,
    known=gated.known("mistral", _KNOWN),
    parts=gated.PARTS,
    packing=gated.PACKING,
)
