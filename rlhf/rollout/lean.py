"""Our own forward for generation: the same numbers as the model's, in a third of the operations.

Weights are packed (packing.py), queries, keys and values come from one product, the residual is
added inside the product, and attention over the cache is two batched products. Prompts are
computed without their pads, and the last layer only for the last position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.models.attention import LOWEST, BlockAttention
from rlhf.rollout.attention import attend_last
from rlhf.rollout.blocks import Block, Network, network
from rlhf.rollout.slab import Slab

# From this head size on, blocks of batched products are faster than torch's CPU flash kernel.
_WIDE_HEAD = 64
Layers = list[tuple[Tensor, Tensor]]


class LeanForward:
    """`prefill` and `decode` of a `Network`."""

    def __init__(self, parts: Network) -> None:
        self._parts = parts

    @classmethod
    def of(cls, model: Any) -> LeanForward | None:
        """None where blocks.py does not know the model."""
        parts = network(model)
        return None if parts is None else cls(parts)

    def prefill(self, ids: Tensor, mask: Tensor) -> tuple[Layers, Tensor]:
        """Left-padded prompts ids (B, T), mask (B, T) bool -> keys and values (B, groups, T,
        size) of each layer, zero on pads, and the logits (B, V) after the last token."""
        parts = self._parts
        batch, width = ids.shape
        real = None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1)
        positions = (mask.long().cumsum(dim=1) - 1)[mask]
        x = parts.embed(ids[mask], positions)
        angles = self._angles(x, positions)
        causal = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
        visible = None if real is None else causal & mask[:, None, None]
        hidden_pads = None if real is None else _bias(mask, x.dtype)
        layers: Layers = []
        for block in parts.blocks:
            queries, keys, values = (
                _padded(rows, real, batch, width) for rows in self._project(block, x, angles)
            )
            layers.append((keys, values))
            if len(layers) == len(parts.blocks):
                context = _last_only(block, queries[:, :, -1], keys, values, hidden_pads)
                x = x[mask.sum(1).cumsum(0) - 1]
            else:
                context = _whole(queries, keys, values, visible, block.scale)
                context = context if real is None else context[real]
            x = block.out.added_to(x, context)
            x = _feed_forward(block, x)
        return layers, parts.head(parts.final_norm(x))

    def decode(self, tokens: Tensor, positions: Tensor, slab: Slab) -> Tensor:
        """One step: tokens (B,) at positions (B,) -> logits (B, V); keys and values go to the
        slab's next column, which the caller counts."""
        parts = self._parts
        x = parts.embed(tokens, positions)
        angles = self._angles(x, positions)
        bias = slab.bias(x.dtype)
        for block, layer in zip(parts.blocks, slab.layers, strict=True):
            queries, keys, values = self._project(block, x, angles)
            layer.write(keys, values)
            context = attend_last(queries * block.scale, *layer.flat(), bias)
            x = block.out.added_to(x, context)
            x = _feed_forward(block, x)
        return parts.head(parts.final_norm(x))

    def _angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin (R, 1, size), the first half of sin negated: x cos + swap(x) sin."""
        if self._parts.rotary is None:
            return None
        cos, sin = self._parts.rotary(x, positions[None])
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
        return cos[0, :, None], signed[:, None]

    def _project(
        self, block: Block, x: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (R, heads, size), keys and values (R, groups, size), positions applied."""
        parts = self._parts
        rows = block.qkv(block.attention_norm(x)).view(len(x), -1, parts.size)
        both, values = rows[:, : -parts.groups], rows[:, -parts.groups :]
        if block.head_norms is not None:
            norm_queries, norm_keys = block.head_norms
            queries, keys = both.split((parts.heads, parts.groups), dim=1)
            both = torch.cat((norm_queries(queries), norm_keys(keys)), dim=1)
        if angles is not None:
            cos, sin = angles
            both = torch.addcmul(both * cos, both.roll(parts.size // 2, -1), sin)
        return both[:, : parts.heads], both[:, parts.heads :], values


def _padded(rows: Tensor, real: Tensor | None, batch: int, width: int) -> Tensor:
    """(R, heads, size) of the real tokens -> (B, heads, T, size), zero on pads."""
    if real is not None:
        whole = rows.new_zeros(batch * width, *rows.shape[1:])
        rows = whole.index_copy_(0, real, rows)
    return rows.reshape(batch, width, *rows.shape[1:]).transpose(1, 2)


def _last_only(
    block: Block, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """The last layer: one query a row, (B, heads, size) -> (B, heads * size)."""
    return attend_last(queries * block.scale, keys.flatten(0, 1), values.flatten(0, 1), bias)


def _feed_forward(block: Block, x: Tensor) -> Tensor:
    return block.down.added_to(x, block.activation(block.up(block.mlp_norm(x))))


def _whole(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """Causal attention of whole prompts: queries (B, heads, T, size) -> (B * T, heads * size)."""
    half = queries.device.type == "cpu" and queries.dtype == torch.bfloat16
    if half and queries.shape[3] >= _WIDE_HEAD:
        bias = None
        if visible is not None:
            zeros = torch.zeros(visible.shape, dtype=queries.dtype)
            bias = zeros.masked_fill_(~visible, LOWEST)
        context = BlockAttention.apply(queries, keys, values, bias, scale)
    else:
        repeat = queries.shape[1] // keys.shape[1]
        if repeat > 1:
            keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
        context = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, is_causal=visible is None, scale=scale
        )
    batch, heads, width, size = context.shape
    return context.transpose(1, 2).reshape(batch * width, heads * size)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T): 0 where visible, -inf elsewhere."""
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, float("-inf"))[:, None]
