"""The rollout, the scores and generation_config.json describe one distribution (issue 10)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf import models
from rlhf.config.schema import RolloutConfig
from rlhf.errors import RequirementError
from rlhf.models.generation import end_ids, without_text
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout import SamplingConfig, build_rollout
from rlhf.rollout.vllm import named_weights, write_config
from tests.unit import model_help as help_
from tests.unit.rollout_support import prompts

EXTRA = 400  # rows of embeddings beyond the tokenizer


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


def padded(**settings: Any) -> Any:
    """A policy with more rows than its tokenizer, the spare ones likelier than the others."""
    module = help_.load_policy(name=help_.lively(), **settings)
    size = module.vocab_size
    module.model.resize_token_embeddings(size + EXTRA)
    with torch.no_grad():
        table = module.model.get_input_embeddings().weight
        table[size:] = table[:EXTRA].repeat(2, 1)[:EXTRA] * 1.5
    return module


@pytest.mark.parametrize("engine", ["continuous", "hybrid"])
def test_ids_beyond_the_tokenizer_are_never_sampled(engine: str) -> None:
    """And the rollout's log-probs are those of the policy's forward, which has no such ids."""
    module, tokenizer = padded(), help_.tokenizer()
    size = len(tokenizer)
    sampler = build_rollout(engine, SimpleNamespace(module=module), tokenizer, batch_size=16)
    out = sampler.generate(
        prompts(5, 3, 6, 4), SamplingConfig(max_new_tokens=12, n_samples_per_prompt=4)
    )
    assert int(out.answers.max()) < size
    score = torch.nn.functional.pad(out.answer_mask, (out.response_start_idx[0], 0))
    with torch.no_grad():
        found, _ = module(out.input_ids, out.attention_mask.bool(), score)
    if out.log_probs is not None:
        width = out.answer_mask.shape[1]
        torch.testing.assert_close(found[:, -width:], out.log_probs, atol=1e-4, rtol=0)


def test_log_probs_are_over_the_tokenizers_ids() -> None:
    """Forward and fused loss: by hand, from the logits of the first `vocab_size` rows alone."""
    module = padded()
    ids = torch.arange(3, 19)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        logits = module.model(ids).logits[0, :-1, : module.vocab_size]
        wanted = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        found, entropy = module(ids, mask, mask, with_entropy=True)
    torch.testing.assert_close(found[0, 1:], wanted, atol=1e-5, rtol=0)
    p = logits.softmax(-1)
    torch.testing.assert_close(entropy[0, 1:], -(p * p.log()).sum(-1), atol=1e-4, rtol=0)
    loss, _ = module(ids, mask, mask, token_loss=lambda lp, _, __: -lp.sum())
    loss.backward()
    torch.testing.assert_close(loss.detach(), -wanted.sum(), atol=1e-3, rtol=0)


def test_what_vllm_gets_has_no_spare_rows(tmp_path: Path) -> None:
    """Its config and its weights end where the tokenizer ends."""
    module = padded()
    write_config(module.model, tmp_path, module.vocab_size)
    weights = dict(named_weights(module.model, module.vocab_size))
    config = type(module.model.config).from_pretrained(tmp_path)
    assert config.vocab_size == module.vocab_size == len(weights["model.embed_tokens.weight"])


def test_generate_samples_as_in_training(tmp_path: Path) -> None:
    """A fresh process, `generate()` without arguments: transformers builds exactly the processors
    that the rollout's settings mean, top_k 50 not among them, and ids without text suppressed."""
    module, tokenizer = padded(), help_.tokenizer()
    rollout = RolloutConfig(temperature=0.7, max_new_tokens=9)
    models.Snapshot(module).write(
        tmp_path, tokenizer, card="", generation=models.sampling_settings(rollout)
    )
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
        "m = M.from_pretrained(sys.argv[1]); seen = []\n"
        "import transformers.generation.utils as u\n"
        "whole = m._get_logits_processor\n"
        "def spy(*a, **k):\n"
        "    found = whole(*a, **k); seen.extend(type(p).__name__ for p in found); return found\n"
        "m._get_logits_processor = spy; torch.manual_seed(0)\n"
        "out = m.generate(torch.arange(3, 9)[None].repeat(64, 1))\n"
        "print(sorted(seen), out.shape[1] - 6, int(out.max()), sep='|')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    names, length, highest = result.stdout.strip().splitlines()[-1].split("|")
    assert names == str(sorted(["TemperatureLogitsWarper", "SuppressTokensLogitsProcessor"]))
    assert int(length) <= 9
    assert int(highest) < len(tokenizer)


def test_settings_of_a_rollout() -> None:
    """Every setting that decides what is sampled is written."""
    rollout = RolloutConfig(temperature=1.0, max_new_tokens=32, stop=["\n\n"])
    assert models.sampling_settings(rollout) == {
        **{"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        **{"max_new_tokens": 32, "stop_strings": ["\n\n"]},
    }


def test_several_ids_end_an_answer(tmp_path: Path) -> None:
    """Llama 3's generation config lists some: the rollout ends at any, the artifact keeps them;
    ids that are no special tokens of the tokenizer, and pad, are left out."""
    module, tokenizer = help_.load_policy(name=help_.lively()), help_.tokenizer()
    bos = tokenizer.bos_token_id
    module.model.generation_config.eos_token_id = [tokenizer.eos_token_id, bos, 0, 77]
    assert end_ids(tokenizer, module.model) == (tokenizer.eos_token_id, bos)
    assert without_text(module.model, len(tokenizer)) is None
    with torch.no_grad():  # answers end at once, one way or the other
        table = module.model.get_input_embeddings().weight
        module.model.get_output_embeddings().weight = torch.nn.Parameter(table.clone())
        head = module.model.get_output_embeddings().weight
        head[bos] = head.abs().sum(0) * 0
    sampler = build_rollout("continuous", SimpleNamespace(module=module), tokenizer, batch_size=8)
    out = sampler.generate(
        prompts(5, 3), SamplingConfig(max_new_tokens=60, n_samples_per_prompt=16)
    )
    last = out.answers.gather(1, out.answer_mask.sum(1, keepdim=True) - 1).squeeze(1)
    for token, end in zip(last.tolist(), out.ended.tolist(), strict=True):
        assert end == (token in (bos, tokenizer.eos_token_id))
    inside = out.answers[out.answer_mask]
    assert int((inside == bos).sum()) == int((last == bos).sum())
    models.Snapshot(help_.load_policy(name=help_.lively())).write(
        tmp_path / "a", tokenizer, card=""
    )
    assert GenerationConfig.from_pretrained(tmp_path / "a").eos_token_id == tokenizer.eos_token_id
    module = help_.load_policy(name=help_.lively())
    module.model.generation_config.eos_token_id = [tokenizer.eos_token_id, bos]
    models.Snapshot(module).write(tmp_path / "b", tokenizer, card="")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "b").generation_config
    assert saved.eos_token_id == [tokenizer.eos_token_id, bos]


def test_a_slow_tokenizer_is_refused_at_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no tokenizer.json, which publishing needs after all training."""
    slow = SimpleNamespace(is_fast=False)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: slow)
    with pytest.raises(RequirementError, match=r"'some/model'.*tokenizer\.json"):
        load_tokenizer("some/model", template=None)
