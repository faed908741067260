"""rlhf.models.save and adapters: artifacts that plain transformers and peft open (L2, D8)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from rlhf import models
from rlhf.errors import ConfigError
from rlhf.models.adapters import adapters_off
from step1_sft.main import sft_step
from tests.unit import model_help as help_

IDS = torch.arange(3, 27)[None]
MASK = torch.ones_like(IDS, dtype=torch.bool)


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


def shake_adapters(module: Any) -> None:
    """B starts at 0, so that a fresh adapter proves nothing."""
    g = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                noise = torch.randn(parameter.shape, generator=g) * 0.2
                parameter.copy_(noise.to(parameter.dtype))


def live_logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module.eval().model(IDS).logits.float()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bloom"])
def test_merged_equals_adapter_equals_live(family: str, tmp_path: Path) -> None:
    """L2: the merged artifact, the adapter read by plain peft and the live model agree to 1e-4;
    GPT-2's Conv1D stores its weights transposed. The live model is not touched."""
    module = help_.load_policy(family, name=help_.lively(family), lora={"rank": 3, "alpha": 6})
    base = logits_of(AutoModelForCausalLM.from_pretrained(help_.lively(family)))
    torch.testing.assert_close(live_logits(module), base, atol=1e-5, rtol=0)
    shake_adapters(module)
    live = live_logits(module)
    assert (live - base).abs().max() > 0.1
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    models.Snapshot(module).write(tmp_path, help_.tokenizer(family), card="# card")
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(help_.lively(family)), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits_of(merged), live, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of(adapted), live, atol=1e-4, rtol=1e-4)
    with adapters_off(module.model):
        torch.testing.assert_close(live_logits(module), base, atol=1e-5, rtol=0)


def test_an_adapted_reward_model(tmp_path: Path) -> None:
    """L2: the head is trained in full; merged and adapter read plainly score as the live one."""
    module = help_.load_value("gpt2", name=help_.lively("gpt2"), lora={"rank": 2})
    shake_adapters(module)
    with torch.no_grad():
        live = module.eval()(IDS, MASK)[:, -1]
    models.Snapshot(module).write(tmp_path, help_.tokenizer("gpt2"), card="")
    kind = AutoModelForSequenceClassification
    merged = kind.from_pretrained(tmp_path)
    base = kind.from_pretrained(help_.lively("gpt2"), num_labels=1, pad_token_id=help_.PAD)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for model in (merged, adapted):
        torch.testing.assert_close(logits_of(model).flatten(), live, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bloom", "gemma2", "qwen3"])
def test_every_target_is_published(family: str, tmp_path: Path) -> None:
    """Each linear or embedding layer alone, embeddings and head of tied weights too: the artifact
    has the live logits, or the target is refused before training."""
    plain = AutoModelForCausalLM.from_pretrained(help_.lively(family))
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    targets = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in plain.named_modules()
            if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
        }
    )
    assert len(targets) > 3
    base = logits_of(plain)
    for target in targets:
        lora = {"rank": 2, "alpha": 4, "target_modules": [target]}
        if (family, target) == ("opt", "embed_positions"):
            with pytest.raises(ConfigError, match="embed_positions"):
                help_.load_policy(family, name=help_.lively(family), lora=lora)
            continue
        module = help_.load_policy(family, name=help_.lively(family), lora=lora)
        shake_adapters(module)
        live = live_logits(module)
        assert (live - base).abs().max() > 1e-2, target
        place = tmp_path / target
        models.Snapshot(module).write(place, help_.tokenizer(family), card="")
        merged = logits_of(AutoModelForCausalLM.from_pretrained(place))
        torch.testing.assert_close(merged, live, atol=1e-4, rtol=1e-5, msg=target)
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(help_.lively(family)), place / "adapter"
        )
        torch.testing.assert_close(logits_of(adapted), live, atol=1e-4, rtol=1e-5, msg=target)


def test_merging_in_bf16(tmp_path: Path) -> None:
    """L2: merged bf16 weights are within bf16's rounding of the fp32 sum, and bf16 on disk."""
    module = help_.load_policy(name=help_.lively(), lora={"rank": 3}, dtype="bfloat16")
    shake_adapters(module)
    models.Snapshot(module).write(tmp_path, help_.tokenizer(), card="")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16, "config.json states the dtype of the weights"
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    layer = module.model.get_base_model().model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.float() + layer.scaling["default"] * (
        layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    )
    merged = model.model.layers[0].self_attn.q_proj.weight.float()
    torch.testing.assert_close(merged, exact, atol=2e-2, rtol=1e-2)
    assert (logits_of(model) - live_logits(module)).abs().mean() < 0.1


def test_the_artifact_is_plain(tmp_path: Path) -> None:
    """Issue 2: safetensors, tokenizer with template, generation config, card; `generate` answers;
    tied weights are stored once and tied again. Writing twice writes the same."""
    engine = help_.train_engine(help_.load_policy())
    sft_step(engine, help_.sft_batches(help_.sft_rows(), 8))
    snapshot = models.Snapshot(engine.module)
    generation = {"do_sample": True, "temperature": 0.7, "top_k": 0}
    for name in ("one", "two"):
        snapshot.write(tmp_path / name, help_.tokenizer(), card="# Grüße", generation=generation)
    one = tmp_path / "one"
    assert (one / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    assert (one / "README.md").read_text(encoding="utf-8") == "# Grüße"
    assert not list(one.glob("*.bin"))
    model, info = AutoModelForCausalLM.from_pretrained(one, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits_of(model), live_logits(engine.module), atol=0, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(one)
    settings = GenerationConfig.from_pretrained(one)
    assert settings.eos_token_id == tokenizer.eos_token_id == 2
    assert settings.pad_token_id == tokenizer.pad_token_id == 0
    assert (settings.do_sample, settings.temperature, settings.top_k) == (True, 0.7, 0)
    answer = model.generate(IDS, max_new_tokens=4)
    assert answer.shape[1] > IDS.shape[1]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "\n\nHuman: Hi\n\nAssistant:"
    assert models.fingerprint(tokenizer) == models.fingerprint(help_.tokenizer())


def test_untied_models_keep_both_matrices(tmp_path: Path) -> None:
    """D8: an untied output head is its own tensor in the artifact."""
    hf = AutoModelForCausalLM.from_pretrained(help_.lively())
    config = hf.config
    config.tie_word_embeddings = False
    untied = type(hf)(config)
    help_.spread(untied, seed=2)
    untied.save_pretrained(tmp_path / "source")
    module = help_.load_policy(name=str(tmp_path / "source"))
    models.Snapshot(module).write(tmp_path / "out", help_.tokenizer(), card="")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, untied.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, untied.model.embed_tokens.weight)


def test_grown_embeddings_are_saved(tmp_path: Path) -> None:
    """1: a model whose tokenizer got a pad token loads again with the new size."""
    module = help_.load_policy(vocab_size=len(help_.tokenizer()) + 1)
    models.Snapshot(module).write(tmp_path, help_.tokenizer(), card="")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(help_.tokenizer()) + 1
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size


def test_the_card() -> None:
    card = models.model_card("Title", base="org/base", lines=["perplexity 2.0"])
    assert card.startswith("---\nlibrary_name: transformers\n---\n# Title\n")
    assert "`org/base`" in card
    assert "- perplexity 2.0" in card
