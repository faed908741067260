"""Qwen2 and 2.5: biases on queries, keys and values, whatever the configuration says.

There is no `tiny:qwen2`: for this model type AutoTokenizer ignores the tokenizer that is saved with
a model.
"""

from __future__ import annotations

from functools import partial

from rlhf.families import gated
from rlhf.families.family import Family

_KNOWN = {
    "Qwen/Qwen2.5-0.5B": (24, 896, 14, 2, 4864, 151936, True, 32768),
    "Qwen/Qwen2.5-1.5B": (28, 1536, 12, 2, 8960, 151936, True, 131072),
    "Qwen/Qwen2.5-3B": (36, 2048, 16, 2, 11008, 151936, True, 32768),
    "Qwen/Qwen2.5-7B": (28, 3584, 28, 4, 18944, 152064, False, 131072),
    "Qwen/Qwen2.5-14B": (48, 5120, 40, 8, 13824, 152064, False, 131072),
    "Qwen/Qwen2.5-32B": (64, 5120, 40, 8, 27648, 152064, False, 131072),
}

FAMILY = Family(
    model_type="qwen2",
    causal_class="Qwen2ForCausalLM",
    layer_class="Qwen2DecoderLayer",
    shape=partial(gated.shape, qkv_bias=True),
    saved=gated.SAVED,
    known=gated.known("qwen2", _KNOWN),
    parts=gated.PARTS,
    packing=gated.PACKING,
)
