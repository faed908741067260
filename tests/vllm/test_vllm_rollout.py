"""vLLM as rollout: its tokens score under the trainer, after an update too; stale weights show.

An environment of its own (docs/performance.md): `pytest -n 0 -m vllm tests/vllm`.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.rollout import SamplingConfig
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from rlhf.errors import ConfigError
from rlhf.rollout import build_rollout
from tests.unit.rollout_support import (
    EOS,
    IDS,
    PAD,
    VOCAB,
    char_tokenizer,
    engine_of,
    fresh_log_probs,
    prompts,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
# Largest difference of a token's log-prob, fp32, logits of size 5. Seen: 5e-6.
TOLERANCE = 1e-4
SAMPLED = SamplingConfig(max_new_tokens=16)


def model_of(kind, tied):
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=128,
            pad_token_id=PAD,
            eos_token_id=EOS,
            tie_word_embeddings=tied,
        )
        model = LlamaForCausalLM(config)
    else:
        config = OPTConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            pad_token_id=PAD,
            eos_token_id=EOS,
            tie_word_embeddings=tied,
        )
        model = OPTForCausalLM(config)
    change(model, 1)
    return model.eval()


def change(model, seed):
    """What a training step does, only larger: every weight, embeddings and head included."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=source))


def gap(model, out, temperature=1.0):
    """Largest difference between vLLM's log-probs and a forward of the trainer's model."""
    fresh = fresh_log_probs(model, out, temperature)
    return float((fresh - out.sampler_log_probs)[out.answer_mask].abs().max())


@pytest.fixture(scope="module", params=["llama-tied", "llama", "opt-tied"])
def pair(request):
    """A model and its rollout; one vLLM per model."""
    kind, _, tied = request.param.partition("-")
    model = model_of(kind, tied == "tied")
    rollout = build_rollout("vllm", engine_of(model), IDS, batch_size=8, seed=3)
    yield model, rollout
    rollout.shutdown()


def test_tokens_score_under_the_trainer_after_updates_too(pair):
    model, rollout = pair
    before = torch.random.get_rng_state(), torch.get_num_threads()
    for step in range(3):
        out = rollout.generate(prompts(9, 3, 12, 1, 7), SAMPLED)
        assert out.log_probs is None
        assert not out.exact
        assert out.answer_mask.sum() > 20
        assert gap(model, out) < TOLERANCE, f"after {step} updates"
        change(model, 10 + step)
        rollout.sync_weights(step)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == torch.get_num_threads()


def test_a_stale_weight_is_seen(pair):
    """Without the push the difference is far above the tolerance; also with the head alone."""
    model, rollout = pair
    rollout.sync_weights(0)
    rollout.generate(prompts(9, 3), SAMPLED)
    change(model, 20)
    assert gap(model, rollout.generate(prompts(9, 3), SAMPLED)) > 100 * TOLERANCE
    rollout.sync_weights(1)
    assert gap(model, rollout.generate(prompts(9, 3), SAMPLED)) < TOLERANCE


def test_a_stale_head_is_seen(pair, monkeypatch):
    """What vLLM's own reload leaves behind where embeddings are tied."""
    model, rollout = pair
    if not model.config.tie_word_embeddings:
        pytest.skip("the head is a weight of its own")

    def reload_only(worker, weights):
        worker.reload_weights(weights_iterator=iter(weights), is_checkpoint_format=True)

    change(model, 30)
    rollout.sync_weights(0)
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.rollout.vllm.load_weights", reload_only)
        stale = gap(model, rollout.generate(prompts(9, 3), SAMPLED))
    rollout.sync_weights(1)
    assert gap(model, rollout.generate(prompts(9, 3), SAMPLED)) < TOLERANCE
    assert stale > 100 * TOLERANCE, "vLLM mends this itself now: load_weights can be simpler"


def test_greedy_seeds_samples_and_ends(pair):
    model, rollout = pair
    rollout.sync_weights(0)
    request = prompts(9, 3, 12)
    greedy = rollout.generate(request, SamplingConfig(max_new_tokens=8, temperature=0.0))
    continuous = build_rollout("continuous", engine_of(model), IDS, batch_size=8)
    expected = continuous.generate(request, SamplingConfig(max_new_tokens=8, temperature=0.0))
    assert torch.equal(greedy.input_ids, expected.input_ids)
    state = rollout.state_dict()
    twice = SamplingConfig(max_new_tokens=16, n_samples_per_prompt=2)
    one = rollout.generate(request, twice)
    assert one.input_ids.shape[0] == 6
    assert not torch.equal(one.answers[0], one.answers[1])
    other = rollout.generate(request, twice)
    assert not torch.equal(one.input_ids[:, -1], other.input_ids[:, -1])
    rollout.load_state_dict(state)
    assert torch.equal(rollout.generate(request, twice).input_ids, one.input_ids)
    lengths = one.answer_mask.sum(1)
    last = one.answers.gather(1, lengths[:, None] - 1).squeeze(1)
    assert torch.equal(one.ended, last == EOS)


def test_temperature_stop_strings_and_longer_prompts():
    """vLLM starts again for what does not fit; log-probs are those of logits / temperature."""
    model = model_of("llama", True)
    rollout = build_rollout("vllm", engine_of(model), char_tokenizer(), batch_size=8, stop=["b"])
    hot = SamplingConfig(max_new_tokens=16, temperature=1.5, n_samples_per_prompt=8)
    out = rollout.generate(prompts(5, 9), hot)
    assert gap(model, out, 1.5) < TOLERANCE
    stopped = (out.answers == 3) & out.answer_mask  # 'b'
    assert stopped.any()
    ends = out.answers.gather(1, out.answer_mask.sum(1)[:, None] - 1)
    assert torch.equal(stopped.any(1), (ends == 3).squeeze(1))
    assert out.ended[stopped.any(1)].all()
    filtered = SamplingConfig(max_new_tokens=4, temperature=1.5, top_k=3)
    assert rollout.generate(prompts(5), filtered).sampler_log_probs is None
    assert rollout.generate(prompts(100), SAMPLED).batch_size == 1
    rollout.shutdown()


def test_adapters_are_merged():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model_of("llama", True), config).eval()
    rollout = build_rollout("vllm", engine_of(model), IDS, batch_size=4)
    assert gap(model, rollout.generate(prompts(9, 3), SAMPLED)) < TOLERANCE
    rollout.shutdown()


def test_lockstep_is_refused():
    model = SimpleNamespace(module=None)
    with pytest.raises(ConfigError, match="gather"):
        build_rollout("vllm", model, IDS, batch_size=4, lockstep=True)
