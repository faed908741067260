"""Llama, and the models that use its class: SmolLM2, TinyLlama."""

from __future__ import annotations

from rlhf.families import gated
from rlhf.families.family import Family

_KNOWN = {
    "meta-llama/Llama-2-7b": (32, 4096, 32, 32, 11008, 32000, False, 4096),
    "meta-llama/Llama-2-13b": (40, 5120, 40, 40, 13824, 32000, False, 4096),
    "meta-llama/Llama-2-70b": (80, 8192, 64, 8, 28672, 32000, False, 4096),
    "meta-llama/Meta-Llama-3-8B": (32, 4096, 32, 8, 14336, 128256, False, 8192),
    "meta-llama/Meta-Llama-3-70B": (80, 8192, 64, 8, 28672, 128256, False, 8192),
    "meta-llama/Llama-3.1-8B": (32, 4096, 32, 8, 14336, 128256, False, 131072),
    "meta-llama/Llama-3.1-70B": (80, 8192, 64, 8, 28672, 128256, False, 131072),
    "meta-llama/Llama-3.2-1B": (16, 2048, 32, 8, 8192, 128256, True, 131072),
    "meta-llama/Llama-3.2-3B": (28, 3072, 24, 8, 8192, 128256, True, 131072),
    "HuggingFaceTB/SmolLM2-135M": (30, 576, 9, 3, 1536, 49152, True, 8192),
    "HuggingFaceTB/SmolLM2-360M": (32, 960, 15, 5, 2560, 49152, True, 8192),
    "HuggingFaceTB/SmolLM2-1.7B": (24, 2048, 32, 32, 8192, 49152, True, 8192),
    "TinyLlama/TinyLlama-1.1B": (22, 2048, 32, 4, 5632, 32000, False, 2048),
}

FAMILY = Family(
    model_type="llama",
    causal_class="LlamaForCausalLM",
    layer_class="LlamaDecoderLayer",
    shape=gated.shape,
    saved=gated.SAVED,
    known=gated.known("llama", _KNOWN),
    tiny=gated.tiny,
    parts=gated.PARTS,
    packing=gated.PACKING,
)
