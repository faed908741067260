"""GPT-NeoX (Pythia): rotary positions on a part of each head, attention beside the feed-forward."""

from __future__ import annotations

from typing import Any

from rlhf.families.family import Family, Parts, Saved, Size
from rlhf.families.gated import rotary_sizes
from rlhf.families.shape import Config, ModelShape, fused, layer_norm_decoder

_KNOWN = {  # layers, hidden, heads, mlp, vocabulary
    "70m": (6, 512, 8, 2048, 50304),
    "160m": (12, 768, 12, 3072, 50304),
    "410m": (24, 1024, 16, 4096, 50304),
    "1b": (16, 2048, 8, 8192, 50304),
    "1.4b": (24, 2048, 16, 8192, 50304),
    "2.8b": (32, 2560, 32, 10240, 50304),
    "6.9b": (32, 4096, 32, 16384, 50432),
    "12b": (36, 5120, 40, 20480, 50688),
}


def _known(layers: int, hidden: int, heads: int, mlp: int, vocab: int) -> Config:
    return {
        "model_type": "gpt_neox", "num_hidden_layers": layers, "hidden_size": hidden,
        "num_attention_heads": heads, "intermediate_size": mlp, "vocab_size": vocab,
        "tie_word_embeddings": False, "max_position_embeddings": 2048,
    }  # fmt: skip


def _shape(config: Config) -> ModelShape:
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    names = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    return layer_norm_decoder(
        config,
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp=mlp,
        linears=fused(hidden, mlp, names),
        layer_rest=4 * hidden,
        outside=2 * hidden,
        tied=False,
        positions=config.get("max_position_embeddings"),
        dropout=float(config.get("hidden_dropout") or 0.0),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
    )


def _tiny(size: Size) -> dict[str, Any]:
    none = ("attention_dropout", "hidden_dropout", "classifier_dropout")
    return {**rotary_sizes(size), **dict.fromkeys(none, 0.0)}


FAMILY = Family(
    model_type="gpt_neox",
    causal_class="GPTNeoXForCausalLM",
    layer_class="GPTNeoXLayer",
    shape=_shape,
    saved=Saved(6, 2, 2, 2),
    known={f"EleutherAI/pythia-{size}": _known(*row) for size, row in _KNOWN.items()},
    tiny=_tiny,
    parts=Parts("attention", "dense"),
)
