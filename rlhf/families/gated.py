"""What Llama and its relatives share: RMS norms, rotary positions, a gated feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlhf.families.family import Packing, Parts, Saved, Size
from rlhf.families.shape import Config, Linear, ModelShape

PARTS = Parts("self_attn", "o_proj")
SAVED = Saved(6, 2, 2, 4, hidden_16=2, frozen=2)

# Angles that depend on the longest sequence so far cannot be computed row by row.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


def shape(
    config: Config,
    *,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    norms: int = 2,
    head_norms: bool = False,
    tied: bool = False,
) -> ModelShape:
    """The keyword arguments are the family's defaults; `norms` of a layer's width `hidden`."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or head_dim or hidden // heads
    query, kv = heads * head_dim, kv_heads * head_dim
    attention_bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    qkv_bias = qkv_bias or attention_bias
    return ModelShape(
        family=config["model_type"],
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=mlp,
        vocab=config["vocab_size"],
        linears=(
            Linear("q_proj", hidden, query, qkv_bias),
            Linear("k_proj", hidden, kv, qkv_bias),
            Linear("v_proj", hidden, kv, qkv_bias),
            Linear("o_proj", query, hidden, attention_bias),
            Linear("gate_proj", hidden, mlp, mlp_bias),
            Linear("up_proj", hidden, mlp, mlp_bias),
            Linear("down_proj", mlp, hidden, mlp_bias),
        ),
        layer_rest=norms * hidden + (2 * head_dim if head_norms else 0),
        outside=hidden,
        embed_dim=hidden,
        tied=bool(config.get("tie_word_embeddings", tied)),
        positions=config.get("max_position_embeddings"),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
    )


def tiny(size: Size) -> dict[str, Any]:
    return {**rotary_sizes(size), "num_key_value_heads": size["heads"], "attention_dropout": 0.0}


def rotary_sizes(size: Size) -> dict[str, Any]:
    """Names shared by the configurations in Llama's style."""
    return {
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "intermediate_size": size["mlp"],
        "max_position_embeddings": size["positions"],
    }


def known(family: str, rows: Mapping[str, tuple[int, ...]]) -> dict[str, Config]:
    """Rows: layers, hidden, heads, kv heads, mlp, vocabulary, tied, positions."""
    names = (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "vocab_size", "tie_word_embeddings", "max_position_embeddings",
    )  # fmt: skip
    return {
        model: {"model_type": family, **dict(zip(names, row, strict=True))}
        for model, row in rows.items()
    }


def _refuses(config: Any) -> str | None:
    if (config.rope_parameters or {}).get("rope_type", "default") not in _FIXED_ROPE:
        return "rotary angles that change with length"
    kinds = getattr(config, "layer_types", None)
    windowed = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None)
    return "sliding windows" if windowed else None


PACKING = Packing(
    layers="model.layers",
    embed="model.embed_tokens",
    final_norm="model.norm",
    attention="self_attn",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    activation="mlp.act_fn",
    down="mlp.down_proj",
    rotary="model.rotary_emb",
    refuses=_refuses,
)
WITH_HEAD_NORMS = replace(PACKING, head_norms=("self_attn.q_norm", "self_attn.k_norm"))
