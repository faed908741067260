"""Configurations of well-known models, so that planning needs no network.

Public facts of their `config.json`. Tests compare the parameter counts with the published ones.
"""

from __future__ import annotations

import re
from typing import Any

_OPT = {  # size -> layers, hidden, heads
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "1.3b": (24, 2048, 32),
    "2.7b": (32, 2560, 32),
    "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "66b": (64, 9216, 72),
}
# family, layers, hidden, heads, kv heads, mlp, vocabulary, tied, positions
_GATED: dict[str, tuple[str, int, int, int, int, int, int, bool, int]] = {
    "meta-llama/Llama-2-7b": ("llama", 32, 4096, 32, 32, 11008, 32000, False, 4096),
    "meta-llama/Llama-2-13b": ("llama", 40, 5120, 40, 40, 13824, 32000, False, 4096),
    "meta-llama/Llama-2-70b": ("llama", 80, 8192, 64, 8, 28672, 32000, False, 4096),
    "meta-llama/Meta-Llama-3-8B": ("llama", 32, 4096, 32, 8, 14336, 128256, False, 8192),
    "meta-llama/Meta-Llama-3-70B": ("llama", 80, 8192, 64, 8, 28672, 128256, False, 8192),
    "meta-llama/Llama-3.1-8B": ("llama", 32, 4096, 32, 8, 14336, 128256, False, 131072),
    "meta-llama/Llama-3.1-70B": ("llama", 80, 8192, 64, 8, 28672, 128256, False, 131072),
    "meta-llama/Llama-3.2-1B": ("llama", 16, 2048, 32, 8, 8192, 128256, True, 131072),
    "meta-llama/Llama-3.2-3B": ("llama", 28, 3072, 24, 8, 8192, 128256, True, 131072),
    "mistralai/Mistral-7B": ("mistral", 32, 4096, 32, 8, 14336, 32000, False, 32768),
    "HuggingFaceTB/SmolLM2-135M": ("llama", 30, 576, 9, 3, 1536, 49152, True, 8192),
    "HuggingFaceTB/SmolLM2-360M": ("llama", 32, 960, 15, 5, 2560, 49152, True, 8192),
    "HuggingFaceTB/SmolLM2-1.7B": ("llama", 24, 2048, 32, 32, 8192, 49152, True, 8192),
    "TinyLlama/TinyLlama-1.1B": ("llama", 22, 2048, 32, 4, 5632, 32000, False, 2048),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 24, 896, 14, 2, 4864, 151936, True, 32768),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 28, 1536, 12, 2, 8960, 151936, True, 131072),
    "Qwen/Qwen2.5-3B": ("qwen2", 36, 2048, 16, 2, 11008, 151936, True, 32768),
    "Qwen/Qwen2.5-7B": ("qwen2", 28, 3584, 28, 4, 18944, 152064, False, 131072),
    "Qwen/Qwen2.5-14B": ("qwen2", 48, 5120, 40, 8, 13824, 152064, False, 131072),
    "Qwen/Qwen2.5-32B": ("qwen2", 64, 5120, 40, 8, 27648, 152064, False, 131072),
    "Qwen/Qwen3-0.6B": ("qwen3", 28, 1024, 16, 8, 3072, 151936, True, 40960),
    "Qwen/Qwen3-1.7B": ("qwen3", 28, 2048, 16, 8, 6144, 151936, True, 40960),
    "Qwen/Qwen3-4B": ("qwen3", 36, 2560, 32, 8, 9728, 151936, True, 40960),
    "Qwen/Qwen3-8B": ("qwen3", 36, 4096, 32, 8, 12288, 151936, False, 40960),
    "Qwen/Qwen3-14B": ("qwen3", 40, 5120, 40, 8, 17408, 151936, False, 40960),
    "Qwen/Qwen3-32B": ("qwen3", 64, 5120, 64, 8, 25600, 151936, False, 40960),
    "google/gemma-2b": ("gemma", 18, 2048, 8, 1, 16384, 256000, True, 8192),
    "google/gemma-7b": ("gemma", 28, 3072, 16, 16, 24576, 256000, True, 8192),
    "google/gemma-2-2b": ("gemma2", 26, 2304, 8, 4, 9216, 256000, True, 8192),
    "google/gemma-2-9b": ("gemma2", 42, 3584, 16, 8, 14336, 256000, True, 8192),
}
# layers, hidden, heads, mlp, vocabulary
_PYTHIA = {
    "70m": (6, 512, 8, 2048, 50304),
    "160m": (12, 768, 12, 3072, 50304),
    "410m": (24, 1024, 16, 4096, 50304),
    "1b": (16, 2048, 8, 8192, 50304),
    "1.4b": (24, 2048, 16, 8192, 50304),
    "2.8b": (32, 2560, 32, 10240, 50304),
    "6.9b": (32, 4096, 32, 16384, 50432),
    "12b": (36, 5120, 40, 20480, 50688),
}
_GPT2 = {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20)}
_GPT2["gpt2-xl"] = (48, 1600, 25)
_BLOOM = {"560m": (24, 1024, 16), "1b1": (24, 1536, 16), "1b7": (24, 2048, 16)}
_BLOOM |= {"3b": (30, 2560, 32), "7b1": (30, 4096, 32)}

# What fine-tuned and converted repositories of the same model are called.
_SUFFIX = re.compile(r"(-(hf|chat|instruct|base|it|deduped|v\d+(\.\d+)*|step-\S+))+$", re.I)


def known_config(name: str) -> dict[str, Any] | None:
    """The configuration of a model by its hub id, in transformers' names; None: not known."""
    return _TABLE.get(name.lower()) or _TABLE.get(_SUFFIX.sub("", name).lower())


def known_names() -> list[str]:
    return list(_TABLE)


def _build() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for size, (layers, hidden, heads) in _OPT.items():
        odd = size == "350m"  # post-norm, and an embedding narrower than the layers
        table[f"facebook/opt-{size}"] = {
            "model_type": "opt", "num_hidden_layers": layers, "hidden_size": hidden,
            "num_attention_heads": heads, "ffn_dim": 4 * hidden, "vocab_size": 50272,
            "word_embed_proj_dim": 512 if odd else hidden, "do_layer_norm_before": not odd,
            "max_position_embeddings": 2048, "dropout": 0.1,
        }  # fmt: skip
    for name, (family, layers, hidden, heads, kv, mlp, vocab, tied, positions) in _GATED.items():
        table[name] = {
            "model_type": family, "num_hidden_layers": layers, "hidden_size": hidden,
            "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": mlp,
            "vocab_size": vocab, "tie_word_embeddings": tied, "max_position_embeddings": positions,
        }  # fmt: skip
    for size, (layers, hidden, heads, mlp, vocab) in _PYTHIA.items():
        table[f"EleutherAI/pythia-{size}"] = {
            "model_type": "gpt_neox", "num_hidden_layers": layers, "hidden_size": hidden,
            "num_attention_heads": heads, "intermediate_size": mlp, "vocab_size": vocab,
            "tie_word_embeddings": False, "max_position_embeddings": 2048,
        }  # fmt: skip
    for name, (layers, hidden, heads) in _GPT2.items():
        config = {"model_type": "gpt2", "n_layer": layers, "n_embd": hidden, "n_head": heads}
        table[name] = {**config, "n_positions": 1024, "vocab_size": 50257}
        table[f"openai-community/{name}"] = table[name]
    for size, (layers, hidden, heads) in _BLOOM.items():
        config = {"model_type": "bloom", "n_layer": layers, "hidden_size": hidden, "n_head": heads}
        table[f"bigscience/bloom-{size}"] = {**config, "vocab_size": 250880}
    return {name.lower(): config for name, config in table.items()}


_TABLE = _build()
