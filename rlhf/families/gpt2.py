"""GPT-2: learned positions, fused queries, keys and values, matrices stored inputs first."""

from __future__ import annotations

from typing import Any

from rlhf.families.family import Family, Packing, Parts, Saved, Size
from rlhf.families.shape import Config, ModelShape, fused, layer_norm_decoder

_KNOWN = {  # layers, hidden, heads
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}


def _known() -> dict[str, Config]:
    table: dict[str, Config] = {}
    for name, (layers, hidden, heads) in _KNOWN.items():
        config = {"model_type": "gpt2", "n_layer": layers, "n_embd": hidden, "n_head": heads}
        table[name] = table[f"openai-community/{name}"] = {
            **config, "n_positions": 1024, "vocab_size": 50257,
        }  # fmt: skip
    return table


def _shape(config: Config) -> ModelShape:
    hidden = config["n_embd"]
    positions = config.get("n_positions", 1024)
    mlp = config.get("n_inner") or 4 * hidden
    return layer_norm_decoder(
        config,
        hidden=hidden,
        layers=config["n_layer"],
        heads=config["n_head"],
        mlp=mlp,
        linears=fused(hidden, mlp, ("c_attn", "c_proj", "c_fc", "c_proj")),
        layer_rest=4 * hidden,
        outside=positions * hidden + 2 * hidden,
        tied=True,
        positions=positions,
        dropout=float(config.get("resid_pdrop", 0.1)),
        attention_dropout=float(config.get("attn_pdrop", 0.1)),
    )


def _tiny(size: Size) -> dict[str, Any]:
    return {
        "n_embd": size["hidden"],
        "n_layer": size["layers"],
        "n_head": size["heads"],
        "n_inner": size["mlp"] * 3 // 2,  # two matrices with as many weights as a gated three
        "n_positions": size["positions"],
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "summary_first_dropout": 0.0,
    }


FAMILY = Family(
    model_type="gpt2",
    causal_class="GPT2LMHeadModel",
    layer_class="GPT2Block",
    shape=_shape,
    saved=Saved(4, 2, 2, 5),
    known=_known(),
    tiny=_tiny,
    parts=Parts("attn", "c_proj"),
    packing=Packing(
        layers="transformer.h",
        embed="transformer.wte",
        position_table="transformer.wpe",
        final_norm="transformer.ln_f",
        attention="attn",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        up=("mlp.c_fc",),
        activation="mlp.act",
        down="mlp.c_proj",
        transposed=True,
        refuses=lambda config: "cross-attention" if config.add_cross_attention else None,
    ),
)
