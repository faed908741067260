"""BLOOM: ALiBi instead of positions, a feed-forward of 4 x hidden, attention without a kernel."""

from __future__ import annotations

from typing import Any

from rlhf.families.family import Family, Saved, Size
from rlhf.families.shape import Config, ModelShape, fused, layer_norm_decoder

_KNOWN = {  # layers, hidden, heads
    "560m": (24, 1024, 16),
    "1b1": (24, 1536, 16),
    "1b7": (24, 2048, 16),
    "3b": (30, 2560, 32),
    "7b1": (30, 4096, 32),
}


def _known(layers: int, hidden: int, heads: int) -> Config:
    config = {"model_type": "bloom", "n_layer": layers, "hidden_size": hidden, "n_head": heads}
    return {**config, "vocab_size": 250880}


def _shape(config: Config) -> ModelShape:
    hidden = config.get("hidden_size") or config["n_embed"]
    names = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    return layer_norm_decoder(
        config,
        hidden=hidden,
        layers=config.get("n_layer") or config["num_hidden_layers"],
        heads=config.get("n_head") or config["num_attention_heads"],
        mlp=4 * hidden,
        linears=fused(hidden, 4 * hidden, names),
        layer_rest=4 * hidden,
        outside=4 * hidden,  # a norm after the embedding and a final one; no position table
        tied=True,
        positions=None,
        dropout=float(config.get("hidden_dropout") or 0.0),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
    )


def _tiny(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size["hidden"],
        "n_layer": size["layers"],
        "n_head": size["heads"],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


FAMILY = Family(
    model_type="bloom",
    causal_class="BloomForCausalLM",
    layer_class="BloomBlock",
    shape=_shape,
    saved=Saved(8, 2, 2, 1, eager=1, eager_16=3),
    known={f"bigscience/bloom-{size}": _known(*row) for size, row in _KNOWN.items()},
    tiny=_tiny,
)
