"""What our decoder needs of the model families it knows, read from the model's own modules.

One table by class name. An entry gives None where the model has something that the decoder does
not do (adapters, quantised layers, sliding windows, post-norm): it then runs through its own
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

from rlhf.rollout.packing import Packed, weight_and_bias

Function = Callable[[Tensor], Tensor]
# Angles that depend on the longest sequence so far cannot be computed row by row.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


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
    build = FAMILIES.get(type(model).__name__)
    if build is None:
        return None
    try:
        return build(model)
    except Unsupported:
        return None


def _opt(model: Any) -> Network:
    decoder, config = model.model.decoder, model.config
    final = decoder.final_layer_norm
    if not config.do_layer_norm_before or decoder.project_in is not None or final is None:
        raise Unsupported("OPT-350m: norms after the layer, projected embeddings")
    tokens, table = decoder.embed_tokens, decoder.embed_positions
    blocks = []
    for layer in decoder.layers:
        attention = layer.self_attn
        blocks.append(
            Block(
                layer.self_attn_layer_norm,
                _packed(attention.q_proj, attention.k_proj, attention.v_proj),
                _packed(attention.out_proj),
                layer.final_layer_norm,
                _packed(layer.fc1),
                _plain_activation(layer.activation_fn),
                _packed(layer.fc2),
                attention.scaling,
            )
        )
    return Network(
        lambda ids, positions: tokens(ids) + F.embedding(positions + table.offset, table.weight),
        blocks,
        final,
        _head(model.lm_head),
        config.num_attention_heads,
        config.num_attention_heads,
        config.hidden_size // config.num_attention_heads,
    )


def _gpt2(model: Any) -> Network:
    decoder, config = model.transformer, model.config
    if config.add_cross_attention:
        raise Unsupported("cross-attention")
    tokens, table = decoder.wte, decoder.wpe
    blocks = [
        Block(
            layer.ln_1,
            _packed(layer.attn.c_attn),
            _packed(layer.attn.c_proj),
            layer.ln_2,
            _packed(layer.mlp.c_fc),
            _plain_activation(layer.mlp.act),
            _packed(layer.mlp.c_proj),
            layer.attn.scaling,
        )
        for layer in decoder.h
    ]
    return Network(
        lambda ids, positions: tokens(ids) + table(positions),
        blocks,
        decoder.ln_f,
        _head(model.lm_head),
        config.n_head,
        config.n_head,
        config.n_embd // config.n_head,
    )


def _llama(model: Any) -> Network:
    """Llama, Mistral, Qwen2 and Qwen3: rotary positions, gated feed-forward, grouped heads."""
    decoder, config = model.model, model.config
    if (config.rope_parameters or {}).get("rope_type", "default") not in _FIXED_ROPE:
        raise Unsupported("rotary angles that change with length")
    kinds = getattr(config, "layer_types", None)
    windowed = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None)
    if windowed:
        raise Unsupported("sliding windows")
    blocks = []
    for layer in decoder.layers[: config.num_hidden_layers]:
        attention, mlp = layer.self_attn, layer.mlp
        norms = None
        if hasattr(attention, "q_norm"):
            norms = (attention.q_norm, attention.k_norm)
        blocks.append(
            Block(
                layer.input_layernorm,
                _packed(attention.q_proj, attention.k_proj, attention.v_proj),
                _packed(attention.o_proj),
                layer.post_attention_layernorm,
                _packed(mlp.gate_proj, mlp.up_proj),
                _gated_activation(mlp.act_fn),
                _packed(mlp.down_proj),
                attention.scaling,
                norms,
            )
        )
    rotary, tokens = decoder.rotary_emb, decoder.embed_tokens
    return Network(
        lambda ids, positions: tokens(ids),
        blocks,
        decoder.norm,
        _head(model.lm_head),
        config.num_attention_heads,
        config.num_key_value_heads,
        decoder.layers[0].self_attn.head_dim,
        lambda x, positions: rotary(x, positions),
    )


# class name of the model in transformers -> its parts
FAMILIES: dict[str, Callable[[Any], Network]] = {
    "OPTForCausalLM": _opt,
    "GPT2LMHeadModel": _gpt2,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": _llama,
    "Qwen3ForCausalLM": _llama,
}


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
