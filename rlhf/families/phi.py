"""Phi (1, 1.5, 2): rotary positions on a part of each head, attention beside the feed-forward, a
head with a bias. Generation uses the model's own forward."""

from __future__ import annotations

from typing import Any

from rlhf.families.family import Family, Parts, Saved, Size
from rlhf.families.gated import rotary_sizes
from rlhf.families.shape import Config, Linear, ModelShape

_KNOWN = {  # layers, hidden, heads, mlp
    "phi-1": (24, 2048, 32, 8192),
    "phi-1_5": (24, 2048, 32, 8192),
    "phi-2": (32, 2560, 32, 10240),
}


def _known(layers: int, hidden: int, heads: int, mlp: int) -> Config:
    return {
        "model_type": "phi", "num_hidden_layers": layers, "hidden_size": hidden,
        "num_attention_heads": heads, "intermediate_size": mlp, "vocab_size": 51200,
        "tie_word_embeddings": False, "max_position_embeddings": 2048,
    }  # fmt: skip


def _tiny(size: Size) -> dict[str, Any]:
    none = ("attention_dropout", "resid_pdrop", "embd_pdrop")
    return {**rotary_sizes(size), **dict.fromkeys(none, 0.0)}


def _shape(config: Config) -> ModelShape:
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = hidden // heads
    kv = kv_heads * head_dim
    return ModelShape(
        family="phi",
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=mlp,
        vocab=config["vocab_size"],
        linears=(
            Linear("q_proj", hidden, hidden, True),
            Linear("k_proj", hidden, kv, True),
            Linear("v_proj", hidden, kv, True),
            Linear("dense", hidden, hidden, True),
            Linear("fc1", hidden, mlp, True),
            Linear("fc2", mlp, hidden, True),
        ),
        layer_rest=2 * hidden + (4 * head_dim if config.get("qk_layernorm") else 0),
        outside=2 * hidden,
        embed_dim=hidden,
        head_bias=True,
        tied=bool(config.get("tie_word_embeddings", False)),
        positions=config.get("max_position_embeddings", 2048),
        dropout=float(config.get("resid_pdrop") or 0.0),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
    )


FAMILY = Family(
    model_type="phi",
    causal_class="PhiForCausalLM",
    layer_class="PhiDecoderLayer",
    shape=_shape,
    saved=Saved(3, 2, 2, 5),
    known={f"microsoft/{name}": _known(*row) for name, row in _KNOWN.items()},
    tiny=_tiny,
    parts=Parts("self_attn", "dense"),
)
