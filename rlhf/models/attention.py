"""Attention of whole rows in 16 bits on a CPU: batched products instead of torch's flash kernel.

torch's CPU flash kernel multiplies bfloat16 far below the speed of a matrix product, most of all in
its backward pass. Here a block of queries at a time is scored by batched products, which run at
full speed; scores are rounded to the inputs' dtype and softmaxed in fp32 inside torch's kernel, as
in transformers' own `eager` attention. Weights of short rows are kept for the backward pass: four
to six hidden states' bytes at most; those of long rows are made again, so that nothing quadratic in
the length is kept. Future keys are left out by blocks.

transformers looks attention up by the name in the config, which is switched for the time of a
forward (`fast_attention`). fp32, GPUs and gradient checkpointing stay with transformers' choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.needed import FIRST_QUERY, runs_again
from rlhf.models.trusted import attention_fits

NAME = "rlhf_blocks"
QUERY_BLOCK = 64  # queries scored at once
BLOCK_SCORES = 1 << 20  # scores of a block, over the batch rows and heads that it takes in
KEPT = 8  # rows of up to so many times the head's size keep their weights for the backward pass
LOWEST = -1e30  # added to hidden scores; finite, so that a pad that sees nothing is not NaN


class BlockAttention(torch.autograd.Function):
    """softmax(scale q k' + mask) v by blocks.

    q (B, H, T, D); k, v (B, G, T, D), H a multiple of G; bias None (causal) or (B, 1, T, T) of q's
    dtype, 0 or very negative; queries before column `first` are left out: their output is 0.
    Returns (B, H, T, D).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scale: float,
        first: int = 0,
    ) -> Tensor:
        ctx.scale, ctx.first = scale, first
        keep = any(ctx.needs_input_grad) and q.shape[2] <= KEPT * q.shape[3]
        kept: list[Tensor] = []
        # In the layout that the caller flattens next: (B, T, H, D).
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
        out[:, :first] = 0
        for rows, queries in _blocks(q, first):
            part_q, part_k, part_v = _cut(q, k, v, rows, queries)
            weights = _weights(part_q, part_k, bias, scale, rows, queries)
            if keep:
                kept.append(weights)
            result = torch.bmm(weights, part_v)
            out[rows, queries] = _ungrouped(result, out[rows, queries].transpose(1, 2)).transpose(
                1, 2
            )
        ctx.save_for_backward(q, k, v, bias, *kept)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, *kept = ctx.saved_tensors
        (grad,) = grads
        grad_q = torch.empty_like(q)
        grad_q[:, :, : ctx.first] = 0
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for index, (rows, queries) in enumerate(_blocks(q, ctx.first)):
            part_q, part_k, part_v = _cut(q, k, v, rows, queries)
            part_grad = _grouped(grad[rows, :, queries], k.shape[1])
            if kept:
                weights = kept[index]
            else:
                weights = _weights(part_q, part_k, bias, ctx.scale, rows, queries)
            keys = slice(0, queries.stop)
            shape = grad_v[rows, :, keys].shape
            grad_v[rows, :, keys] += torch.bmm(weights.transpose(1, 2), part_grad).view(shape)
            slope = torch.bmm(part_grad, part_v.transpose(1, 2))
            slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype)
            slope *= ctx.scale
            grad_q[rows, :, queries] = _ungrouped(
                torch.bmm(slope, part_k), grad_q[rows, :, queries]
            )
            grad_k[rows, :, keys] += torch.bmm(slope.transpose(1, 2), part_q).view(shape)
        return grad_q, grad_k, grad_v, None, None, None


def _blocks(q: Tensor, first: int) -> Iterator[tuple[slice, slice]]:
    """Batch rows and queries of each block, queries from `first` on."""
    batch, heads, length, _ = q.shape
    for start in range(first, length, QUERY_BLOCK):
        queries = slice(start, min(start + QUERY_BLOCK, length))
        scores = heads * (queries.stop - start) * queries.stop
        step = max(1, BLOCK_SCORES // scores)
        for first in range(0, batch, step):
            yield slice(first, min(first + step, batch)), queries


def _cut(
    q: Tensor, k: Tensor, v: Tensor, rows: slice, queries: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """(n G, r t, D) queries, and the (n G, s, D) keys and values that they may see."""
    keys = slice(0, queries.stop)
    groups = k.shape[1]
    return (
        _grouped(q[rows, :, queries], groups),
        k[rows, :, keys].flatten(0, 1),
        v[rows, :, keys].flatten(0, 1),
    )


def _grouped(part: Tensor, groups: int) -> Tensor:
    """(n, H, t, D) -> (n G, (H / G) t, D): heads that share keys side by side."""
    rows, heads, length, size = part.shape
    return part.reshape(rows * groups, heads // groups * length, size)


def _ungrouped(part: Tensor, like: Tensor) -> Tensor:
    return part.view(like.shape)


def _weights(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, rows: slice, queries: slice
) -> Tensor:
    """(n G, r t, s) attention weights in q's dtype."""
    batch = rows.stop - rows.start
    groups, length = len(k) // batch, queries.stop - queries.start
    repeats = q.shape[1] // length
    if bias is None:
        row = torch.arange(queries.start, queries.stop).unsqueeze(1)
        hidden = row < torch.arange(queries.stop)
        part = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, LOWEST)
        part = part.repeat(repeats, 1).expand(len(k), -1, -1)
    else:
        part = bias[rows, :, queries, : queries.stop]
        part = part.unsqueeze(1).expand(-1, groups, repeats, -1, -1)
        part = part.reshape(len(k), repeats * length, queries.stop)
    return torch.softmax(torch.baddbmm(part, q, k.transpose(1, 2), alpha=scale), dim=-1)


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; what it does not cover goes to transformers' sdpa."""
    same = query.shape[2] == key.shape[2] and query.shape[-1] == value.shape[-1]
    causal = attention_mask is not None or getattr(module, "is_causal", True)
    known = attention_mask is None or attention_mask.dtype == torch.bool
    if dropout or not (same and causal and known) or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    bias = None
    if attention_mask is not None:
        bias = torch.zeros(attention_mask.shape, dtype=query.dtype)
        bias.masked_fill_(~attention_mask, LOWEST)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    first = getattr(module, FIRST_QUERY, 0)
    return BlockAttention.apply(query, key, value, bias, scale, first).transpose(1, 2), None


@contextmanager
def attention_named(model: Any, name: str) -> Iterator[None]:
    """Inside, the parts of the model that use sdpa look up the attention called `name`."""
    parts = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    configs = [c for c in parts.values() if getattr(c, "_attn_implementation", None) == "sdpa"]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


def fast_attention(model: Any) -> AbstractContextManager[None]:
    """Use `block_attention` inside, where it is faster than the model's sdpa."""
    parameter = next(model.parameters())
    half = parameter.dtype in (torch.bfloat16, torch.float16)
    if parameter.device.type != "cpu" or not half or runs_again(model):
        return nullcontext()
    if not attention_fits(model, NAME, attention_named):
        return nullcontext()
    return attention_named(model, NAME)


AttentionInterface.register(NAME, block_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
