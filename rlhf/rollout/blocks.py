"""What our decoder needs of the model families it knows, read from the model's own modules.

Its family says where they are (rlhf/families). A model that has something which the decoder does
not do (adapters, quantised layers, sliding windows, norms after a layer) runs through its own
forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN, NewGELUActivation

from rlhf.families import FAMILIES, Packing
from rlhf.rollout.packing import Packed, weight_and_bias

Function = Callable[[Tensor], Tensor]
_PACKINGS = {family.causal_class: family.packing for family in FAMILIES.values() if family.packing}


class Unsupported(Exception):
    """This model has something that our decoder does not do."""


@dataclass
class Block:
    """One pre-norm layer: x += out(attention(qkv(norm(x)))); x += down(act(up(norm(x))))."""

    attention_norm: Function
    qkv: Packed  # (R, K) -> (R, (heads + 2 * groups) * size): queries, keys, values
    out: Packed
    mlp_norm: Function
    up: Packed  # gate and up, one after the other, if the family has a gate
    activation: Function
    down: Packed
    scale: float  # of the scores
    head_norms: tuple[Function, Function] | None = None  # on queries and keys, per head


@dataclass
class Network:
    """A decoder-only model."""

    embed: Callable[[Tensor, Tensor], Tensor]  # ids, positions (R,) -> (R, K)
    blocks: list[Block]
    final_norm: Function
    head: Function  # (R, K) -> (R, V) logits
    heads: int
    groups: int
    size: int
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def network(model: Any) -> Network | None:
    """The model's parts with packed weights, or None: run its own forward."""
    packing = _PACKINGS.get(type(model).__name__)
    if packing is None or packing.refuses(model.config):
        return None
    try:
        return _build(model, packing)
    except Unsupported:
        return None


def _build(model: Any, packing: Packing) -> Network:
    config = model.config
    at = model.get_submodule
    layers = list(at(packing.layers))[: config.num_hidden_layers]
    heads = config.num_attention_heads
    attention = layers[0].get_submodule(packing.attention)
    return Network(
        embed=_embedding(at(packing.embed), packing.position_table and at(packing.position_table)),
        blocks=[_block(layer, packing) for layer in layers],
        final_norm=at(packing.final_norm),
        head=_head(model.get_output_embeddings()),
        heads=heads,
        groups=getattr(config, "num_key_value_heads", None) or heads,
        size=getattr(attention, "head_dim", config.hidden_size // heads),
        rotary=at(packing.rotary) if packing.rotary else None,
    )


def _block(layer: Any, packing: Packing) -> Block:
    at = layer.get_submodule
    activation = at(packing.activation)
    gated = len(packing.up) == 2
    return Block(
        attention_norm=at(packing.attention_norm),
        qkv=_packed(*map(at, packing.qkv)),
        out=_packed(at(packing.out)),
        mlp_norm=at(packing.mlp_norm),
        up=_packed(*map(at, packing.up)),
        activation=_gated_activation(activation) if gated else _plain_activation(activation),
        down=_packed(at(packing.down)),
        scale=at(packing.attention).scaling,
        head_norms=tuple(map(at, packing.head_norms)) if packing.head_norms else None,
    )


def _embedding(tokens: Any, table: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """ids, positions (R,) -> (R, K)."""
    if not table:
        return lambda ids, positions: tokens(ids)
    offset = getattr(table, "offset", None)
    if offset is None:
        return lambda ids, positions: tokens(ids) + table(positions)
    # OPT's own forward computes positions from a mask.
    return lambda ids, positions: tokens(ids) + F.embedding(positions + offset, table.weight)


def _packed(*modules: nn.Module) -> Packed:
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for module in modules:
        found = weight_and_bias(module)
        if found is None:
            raise Unsupported(f"{type(module).__name__} is not a plain linear layer")
        weights.append(found[0])
        biases.append(found[1])
    return Packed(weights, biases)


def _head(module: nn.Module) -> Function:
    """Packed if it is plain; else as it is."""
    found: Sequence[Any] | None = weight_and_bias(module)
    return module if found is None else Packed([found[0]], [found[1]])


def _plain_activation(activation: Any) -> Function:
    if isinstance(activation, NewGELUActivation):  # the same formula in one operation
        return lambda x: F.gelu(x, approximate="tanh")
    if isinstance(activation, (nn.ReLU, type(ACT2FN["relu"]))):
        return torch.relu_
    return activation


def _gated_activation(activation: Any) -> Function:
    def gated(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return activation(gate) * up

    return gated
