"""Attention of one query over the cache, as two batched products.

On CPU `scaled_dot_product_attention` is slow for a single query: 3 to 10 times slower than this in
half precision.

`attend_last` serves our own forward (lean.py). For other models transformers looks attention up by
the name in the config: the name is switched while generating, and everything but a decode step
goes to transformers' own sdpa functions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.attention import attention_named

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
    queries = (query * scale).view(batch, groups, heads // groups, size)
    scores = torch.matmul(queries, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    return torch.matmul(scores.softmax(dim=-1), value).view(batch, 1, heads, value.shape[3]), None


def attend_last(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """One query a row: (B, heads, D), scaled -> (B, heads * D).

    Args:
        keys, values: (B * groups, L, D); `heads` is a multiple of `groups`.
        bias: (B, 1, L), 0 or -inf, or None where everything is visible.

    torch's softmax over half precision computes in fp32 and rounds once.
    """
    batch, heads, size = queries.shape
    scores = torch.bmm(queries.reshape(len(keys), -1, size), keys.transpose(1, 2))
    if bias is not None:
        scores.view(batch, heads, -1).add_(bias)
    return torch.bmm(scores.softmax(dim=-1), values).view(batch, heads * size)


def lean_attention(model: nn.Module) -> AbstractContextManager[None]:
    """Use `decode_attention` inside, where it helps and the model uses sdpa."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return attention_named(model, NAME) if on_cpu else nullcontext()


AttentionInterface.register(NAME, decode_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
