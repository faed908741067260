"""Attention of one query over the cache, in half precision on CPU.

There `scaled_dot_product_attention` is slow for a single query; two batched products are 2 to 3
times faster (fp32: no gain, so it is left alone). transformers looks attention up by the name in
the config, so the name is switched while generating. Everything but a decode step goes to
transformers' own sdpa functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rlhf_decode"


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, T, D), key and value (B, G, K, D) with H a
    multiple of G, mask (B, 1, T, K) bool; returns (B, T, H, D). Softmax in fp32."""
    if query.shape[2] != 1 or dropout or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    # Keys on the left: a tall matrix times a few columns is the shape that CPU products like.
    queries = (query * scale).view(batch, groups, heads // groups, size)
    scores = torch.matmul(key, queries.transpose(2, 3)).transpose(2, 3)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).view(batch, 1, heads, value.shape[3]), None


@contextmanager
def lean_attention(model: nn.Module) -> Iterator[None]:
    """Use `decode_attention` inside, where it helps and the model uses sdpa."""
    parameter = next(model.parameters())
    configs: list[Any] = []
    if parameter.device.type == "cpu" and parameter.dtype in (torch.bfloat16, torch.float16):
        parts = [part.config for part in model.modules() if hasattr(part, "config")]
        configs = [c for c in parts if getattr(c, "_attn_implementation", None) == "sdpa"]
    AttentionInterface.register(NAME, decode_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"
