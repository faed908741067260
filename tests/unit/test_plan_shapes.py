"""Parameter counts: equal to real models on the meta device, and to the published ones."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.config.training import LoraConfig
from rlhf.errors import ConfigError, RequirementError
from rlhf.families import TINY_FAMILIES
from rlhf.models.adapters import add_adapters
from rlhf.models.tiny import build_tiny
from rlhf.plan import read
from rlhf.plan.known import known_config, known_names
from rlhf.plan.lora import adapter_parameters
from rlhf.plan.shapes import planned_families, shape_of

# Parameters as the model cards or papers state them, tied weights once.
PUBLISHED = {
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-6.7b": 6_658_473_984,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "google/gemma-2-2b-it": 2_614_341_888,
    "openai-community/gpt2": 124_439_808,
    "EleutherAI/pythia-1b-deduped": 1_011_781_632,
    "bigscience/bloom-560m": 559_214_592,
    "microsoft/phi-2": 2_779_683_840,
}


def meta_model(config: Any, auto: Any = AutoModelForCausalLM) -> Any:
    with torch.device("meta"):
        return auto.from_config(config)


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in known_names() if "/" in n])
def test_known_models_have_as_many_parameters_as_transformers_builds(name: str) -> None:
    config = dict(known_config(name) or {})
    shape = shape_of(config)
    # Two layers: the rest repeats them. (48 models of up to 70 billion are slow even on meta.)
    for key in ("num_hidden_layers", "n_layer"):
        if key in config:
            config[key] = 2
    short = shape_of(config)
    family = config.pop("model_type")
    model = meta_model(AutoConfig.for_model(family, **config))
    assert short.causal == count(model)
    assert shape.causal - short.causal == (shape.layers - 2) * shape.layer


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_as_many_parameters_as_published(name: str) -> None:
    assert shape_of(known_config(name) or {}).causal == PUBLISHED[name]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tiny_models_are_planned_as_they_are_built(family: str, tmp_path: Path) -> None:
    build_tiny(family, ["a b c d e f g"], tmp_path, seed=0, vocab_size=300)
    vocab = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    built = read.read_shape(str(tmp_path))
    planned = shape_of({**read.tiny_config(family), "vocab_size": vocab})
    config = AutoConfig.from_pretrained(tmp_path)
    assert built.causal == planned.causal == count(meta_model(config))
    config.num_labels = 1
    assert built.scalar == count(meta_model(config, AutoModelForSequenceClassification))
    assert built.dropout == planned.dropout == 0.0


@pytest.mark.parametrize("family", planned_families())
@pytest.mark.parametrize("last_layers", [None, 1])
def test_adapters_have_as_many_parameters_as_peft_makes(
    family: str, last_layers: int | None
) -> None:
    config = AutoConfig.for_model(
        family, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=99
    )
    for key, value in {"num_key_value_heads": 2, "intermediate_size": 160, "ffn_dim": 160,
                       "head_dim": 24, "word_embed_proj_dim": 32}.items():  # fmt: skip
        if hasattr(config, key):
            setattr(config, key, value)
    config.pad_token_id = 0
    shape = shape_of(config.to_dict())
    lora = LoraConfig(rank=4, last_layers=last_layers)
    model = meta_model(config)
    assert shape.causal == count(model)
    if family == "opt" and last_layers:
        pytest.skip("peft's layers_to_transform and OPT's projections outside layers")
    adapted = add_adapters(model, lora, task="CAUSAL_LM", dropout=False)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter_parameters(shape, lora) == trained
    scalar = meta_model(config, AutoModelForSequenceClassification)
    adapted = add_adapters(scalar, lora, task="SEQ_CLS", dropout=False)
    adapters = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert adapter_parameters(shape, lora) == adapters


def test_adapters_on_named_matrices() -> None:
    shape = shape_of(known_config("facebook/opt-125m") or {})
    lora = LoraConfig(rank=8, target_modules=["q_proj", "v_proj"])
    assert adapter_parameters(shape, lora) == 12 * 2 * 8 * (768 + 768)
    regex = LoraConfig(rank=8, target_modules=r".*\.(fc1|fc2)")
    assert adapter_parameters(shape, regex) == 12 * 2 * 8 * (768 + 3072)
    assert adapter_parameters(shape, LoraConfig()) == 0


def test_a_model_that_nothing_is_known_of_is_refused() -> None:
    with pytest.raises(RequirementError, match=r"'owner/none'.*config\.json"):
        read.read_shape("owner/none")
    with pytest.raises(ConfigError, match="model type 'mamba'"):
        shape_of({"model_type": "mamba"}, "x")
    with pytest.raises(ConfigError, match="hidden_size"):
        shape_of({"model_type": "llama"}, "x")


def test_the_hub_cache_comes_before_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--facebook--opt-125m" / "snapshots" / "abc"
    place.mkdir(parents=True)
    config = {**(known_config("facebook/opt-125m") or {}), "num_hidden_layers": 3}
    (place / "config.json").write_text(json.dumps(config))
    assert read.read_shape("facebook/opt-125m").layers == 3


def test_a_gguf_header_is_read_without_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(tied=False))
    shape = read.read_shape(str(path))
    assert (shape.layers, shape.hidden, shape.kv_heads, shape.vocab) == (2, 16, 2, 5)
    assert not shape.tied
    path.write_bytes(gguf_bytes(tied=True))
    assert read.read_shape(str(path)).tied
    path.write_bytes(gguf_bytes(tied=True)[:40])
    with pytest.raises(RequirementError, match=re.escape(str(path))):
        read.read_shape(str(path))


def gguf_bytes(tied: bool) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {
        "block_count": 2, "embedding_length": 16, "feed_forward_length": 24,
        "attention.head_count": 4, "attention.head_count_kv": 2, "context_length": 64,
    }  # fmt: skip
    entries = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    entries += [text(f"llama.{k}") + struct.pack("<II", 4, v) for k, v in numbers.items()]
    tokens = b"".join(text(token) for token in "abcde")
    entries.append(text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 5) + tokens)
    entries.append(text("some.floats") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3))
    names = ["token_embd.weight"] + ([] if tied else ["output.weight"])
    tensors = [text(n) + struct.pack("<I2QIQ", 2, 16, 5, 0, 0) for n in names]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    return head + b"".join(entries + tensors)
