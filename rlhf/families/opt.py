"""OPT: learned positions, layer norms; opt-350m alone has norms after the layer and an embedding
narrower than its layers."""

from __future__ import annotations

from typing import Any

from rlhf.families.family import Family, Packing, Parts, Saved, Size
from rlhf.families.shape import Config, Linear, ModelShape

_KNOWN = {  # size -> layers, hidden, heads
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "1.3b": (24, 2048, 32),
    "2.7b": (32, 2560, 32),
    "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "66b": (64, 9216, 72),
}


def _known(size: str, layers: int, hidden: int, heads: int) -> Config:
    odd = size == "350m"
    return {
        "model_type": "opt", "num_hidden_layers": layers, "hidden_size": hidden,
        "num_attention_heads": heads, "ffn_dim": 4 * hidden, "vocab_size": 50272,
        "word_embed_proj_dim": 512 if odd else hidden, "do_layer_norm_before": not odd,
        "max_position_embeddings": 2048, "dropout": 0.1,
    }  # fmt: skip


def _shape(config: Config) -> ModelShape:
    hidden, mlp = config["hidden_size"], config["ffn_dim"]
    embed = config.get("word_embed_proj_dim") or hidden
    bias = bool(config.get("enable_bias", True))
    norm = 2 * hidden if config.get("layer_norm_elementwise_affine", True) else 0
    projections: tuple[Linear, ...] = ()
    if embed != hidden:
        projections = (Linear("project_out", hidden, embed), Linear("project_in", embed, hidden))
    positions = config.get("max_position_embeddings", 2048)
    before = config.get("do_layer_norm_before", True)
    final_norm = norm if before and not config.get("_remove_final_layer_norm", False) else 0
    return ModelShape(
        family="opt",
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=config["num_attention_heads"],
        kv_heads=config["num_attention_heads"],
        head_dim=hidden // config["num_attention_heads"],
        mlp=mlp,
        vocab=config["vocab_size"],
        linears=(
            *(Linear(f"{x}_proj", hidden, hidden, bias) for x in "qkv"),
            Linear("out_proj", hidden, hidden, bias),
            Linear("fc1", hidden, mlp, bias),
            Linear("fc2", mlp, hidden, bias),
        ),
        layer_rest=2 * norm,
        # OPT's position table has two more rows than positions.
        outside=(positions + 2) * hidden + final_norm + sum(p.size for p in projections),
        outside_linears=projections,
        embed_dim=embed,
        tied=bool(config.get("tie_word_embeddings", True)),
        positions=positions,
        dropout=float(config.get("dropout", 0.1)),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
    )


def _tiny(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size["hidden"],
        "word_embed_proj_dim": size["hidden"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "ffn_dim": size["mlp"] * 3 // 2,  # two matrices with as many weights as a gated three
        "max_position_embeddings": size["positions"],
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
    }


def _refuses(config: Any) -> str | None:
    narrow = config.word_embed_proj_dim != config.hidden_size
    if not config.do_layer_norm_before or config._remove_final_layer_norm or narrow:
        return "norms after the layer, projected embeddings (opt-350m)"
    return None


FAMILY = Family(
    model_type="opt",
    causal_class="OPTForCausalLM",
    layer_class="OPTDecoderLayer",
    shape=_shape,
    saved=Saved(4, 2, 2, 1),
    known={f"facebook/opt-{size}": _known(size, *row) for size, row in _KNOWN.items()},
    tiny=_tiny,
    parts=Parts("self_attn", "out_proj", "fc1", "fc2"),
    hybrid_kernels=True,
    packing=Packing(
        layers="model.decoder.layers",
        embed="model.decoder.embed_tokens",
        position_table="model.decoder.embed_positions",
        final_norm="model.decoder.final_layer_norm",
        attention="self_attn",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.out_proj",
        up=("fc1",),
        activation="activation_fn",
        down="fc2",
        refuses=_refuses,
    ),
)
