"""What every rollout engine owes: shapes, ends, seeds, filters, stop strings (ROLLOUTS)."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.rollout import RolloutEngine, RolloutRequest, SamplingConfig

from rlhf.errors import ConfigError, RequirementError
from rlhf.rollout import ROLLOUTS, Generation, build_rollout
from tests.unit.rollout_support import (
    EOS,
    IDS,
    PAD,
    VOCAB,
    char_tokenizer,
    engine_of,
    hf_greedy,
    prompts,
    spread_eos,
    tiny_model,
)

GREEDY = SamplingConfig(max_new_tokens=16, temperature=0.0)
SAMPLED = SamplingConfig(max_new_tokens=12)


@pytest.fixture(params=sorted(set(ROLLOUTS) - {"vllm"}))  # its own tests: tests/vllm
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def build(name, model, tokenizer=IDS, **options):
    return build_rollout(name, engine_of(model), tokenizer, **{"batch_size": 4} | options)


def check_shapes(out, request, sampling):
    """The invariants that the trainer relies on."""
    rows = len(request.prompt_ids) * sampling.n_samples_per_prompt
    width = request.prompt_ids.shape[1]
    assert isinstance(out, Generation)
    assert out.answer_mask.shape[0] == rows
    assert 1 <= out.answer_mask.shape[1] <= sampling.max_new_tokens
    assert out.input_ids.shape == (rows, width + out.answer_mask.shape[1])
    assert out.response_start_idx.tolist() == [width] * rows
    assert out.answer_mask.dtype == torch.bool
    assert out.ended.dtype == torch.bool
    lengths = out.answer_mask.sum(1)
    assert (lengths >= 1).all()
    assert int(lengths.max()) == out.answer_mask.shape[1]
    assert torch.equal(out.answer_mask, torch.arange(int(lengths.max())) < lengths[:, None])
    assert (out.answers[~out.answer_mask] == PAD).all()
    n = sampling.n_samples_per_prompt
    assert torch.equal(out.input_ids[::n, :width], request.prompt_ids)
    assert torch.equal(out.attention_mask[::n, :width].bool(), request.prompt_attention_mask.bool())
    assert torch.equal(out.attention_mask[:, width:].bool(), out.answer_mask)
    # Ended: EOS is the last counted token; not ended: the limit was reached without EOS.
    eos = (out.answers == EOS) & out.answer_mask
    assert torch.equal(eos.any(1), out.ended)
    assert (eos.sum(1) <= 1).all()
    assert (lengths[~out.ended] == sampling.max_new_tokens).all()
    assert (out.answers[out.ended, lengths[out.ended] - 1] == EOS).all()


@pytest.mark.parametrize("lengths", [(5, 2, 9, 1, 9), (4, 4, 4), (6,)], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("limit", [1, 12])
def test_shapes_and_masks(name, model, lengths, samples, limit):
    """ALGORITHM 16, and the mask convention."""
    sampling = replace(SAMPLED, max_new_tokens=limit, n_samples_per_prompt=samples)
    request = prompts(*lengths)
    out = build(name, model).generate(request, sampling)
    assert isinstance(build(name, model), RolloutEngine)
    check_shapes(out, request, sampling)


def test_early_eos_is_kept_counted_and_last(name):
    """ALGORITHM 16: answers equal model.generate's up to their first EOS, for mixed ends."""
    model, request = tiny_model("llama", seed=3), prompts(5, 2, 9, 1, 9, 7)
    eos = spread_eos(hf_greedy(model, request, 16, None))
    expected = hf_greedy(model, request, 16, eos)
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=eos)
    out = build(name, model, tokenizer).generate(request, GREEDY)
    lengths = out.answer_mask.sum(1)
    assert len(set(lengths.tolist())) >= 3, "the case must have mixed ends"
    assert torch.equal(out.answers, expected[:, : out.answers.shape[1]])
    assert (expected[:, out.answers.shape[1] :] == PAD).all()
    assert torch.equal(out.ended, (expected == eos).any(1))


def test_sampled_pad_and_prompt_eos_are_ordinary_tokens(name):
    """ALGORITHM 1, 16: only the answer's own EOS ends it; a sampled pad id counts."""
    model = tiny_model("llama", seed=3)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token equally likely
    request = prompts(5, 3)
    request.prompt_ids[:, -1] = EOS
    sampling = replace(SAMPLED, n_samples_per_prompt=40, max_new_tokens=8)
    out = build(name, model, batch_size=80).generate(request, sampling)
    check_shapes(out, request, sampling)
    assert ((out.answers == PAD) & out.answer_mask).any(), "about 10 of 640 tokens are pads"


def test_same_seed_same_answers_and_ranks_differ(name, model):
    """ALGORITHM 19; resuming from state_dict continues the same stream."""
    request = prompts(5, 2, 9)
    first, again = build(name, model, seed=7), build(name, model, seed=7)
    one, two = first.generate(request, SAMPLED), first.generate(request, SAMPLED)
    assert torch.equal(one.input_ids, again.generate(request, SAMPLED).input_ids)
    assert not torch.equal(one.answers, two.answers)
    for other in ({"seed": 7, "rank": 1, "world": 2}, {"seed": 8}):
        out = build(name, model, **other).generate(request, SAMPLED)
        assert not torch.equal(one.answers, out.answers)
    resumed = build(name, model, seed=999)
    resumed.load_state_dict(again.state_dict())
    assert torch.equal(two.input_ids, resumed.generate(request, SAMPLED).input_ids)


def test_global_random_state_and_training_mode_are_left_alone(name, model):
    """ALGORITHM 18: no dropout in rollout, and each submodule's mode comes back."""
    engine = engine_of(model)
    engine.module.train()
    engine.module.model.lm_head.eval()
    modes = [part.training for part in engine.module.modules()]
    attention = model.config._attn_implementation
    before = torch.random.get_rng_state()
    seen = []
    hook = model.model.norm.register_forward_pre_hook(lambda *_: seen.append(model.training))
    build_rollout(name, engine, IDS, batch_size=2).generate(prompts(3, 4), SAMPLED)
    hook.remove()
    assert seen
    assert not any(seen)
    assert modes == [part.training for part in engine.module.modules()]
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.config._attn_implementation == attention
    model.eval()


def test_first_token_follows_the_softmax(name, model):
    """ALGORITHM 14, 15: chi-square of 3000 first tokens against softmax(logits / temperature)."""
    request, count, temperature = prompts(6), 3000, 1.7
    sampling = SamplingConfig(1, temperature=temperature, n_samples_per_prompt=count)
    out = build(name, model, batch_size=count).generate(request, sampling)
    with torch.no_grad():
        logits = model(input_ids=request.prompt_ids).logits[0, -1]
    expected = (logits / temperature).softmax(-1) * count
    seen = torch.bincount(out.answers[:, 0], minlength=VOCAB).float()
    common = expected >= 5
    assert common.sum() >= 8
    rare = torch.stack([seen[~common].sum(), expected[~common].sum().clamp(min=1e-9)])
    chi = ((seen - expected)[common] ** 2 / expected[common]).sum() + (rare[0] - rare[1]) ** 2 / (
        rare[1].clamp(min=1.0)
    )
    freedom = int(common.sum())
    assert chi < freedom + 4 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (-1, 0.6), (0, 0.6), (5, 0.7)])
def test_filters(name, model, top_k, top_p):
    """top_k <= 0 is off; kept tokens are transformers' own, worked out here from a sort."""
    request, count = prompts(6), 400
    with torch.no_grad():
        probs = model(input_ids=request.prompt_ids).logits[0, -1].softmax(-1)
    order = probs.argsort(descending=True)
    if top_k > 0:
        order = order[:top_k]
    mass, kept = 0.0, []
    for token in order.tolist():
        if mass >= top_p:
            break
        kept.append(token)
        mass += float(probs[token] / probs[order].sum())
    sampling = SamplingConfig(1, top_k=top_k, top_p=top_p, n_samples_per_prompt=count)
    out = build(name, model, batch_size=count).generate(request, sampling)
    likely = {t for t in kept if float(probs[t] / probs[kept].sum()) > 0.03}
    assert set(out.answers[:, 0].tolist()) <= set(kept)
    assert likely <= set(out.answers[:, 0].tolist())


def test_stop_strings_end_the_answer_and_count_as_ended(name):
    """ALGORITHM 16: cut at the token that completes the string; EOS may come first."""
    model, request, tokenizer = tiny_model("llama", seed=3), prompts(5, 2, 9, 7), char_tokenizer()
    free = hf_greedy(model, request, 16, None)
    texts = [tokenizer.decode(row) for row in free]
    stop = texts[0][3:5]
    out = build(name, model, tokenizer, stop=[stop, "never"]).generate(request, GREEDY)
    assert texts[0].find(stop) + 2 < 16
    for row, text in enumerate(texts):
        at, eos = text.find(stop), free[row].tolist()
        length = min(at + 2 if at >= 0 else 16, eos.index(EOS) + 1 if EOS in eos else 16)
        assert int(out.answer_mask[row].sum()) == length
        assert bool(out.ended[row]) == (length < 16)
    assert torch.equal(
        out.answers[out.answer_mask], free[:, : out.answers.shape[1]][out.answer_mask]
    )
    assert (out.answers[~out.answer_mask] == PAD).all()
    # As it is read: the text before the stop string, EOS in its place.
    width = request.prompt_ids.shape[1]
    assert torch.equal(out.read_ids[:, :width], request.prompt_ids)
    assert torch.equal(out.read_mask[:, :width], request.prompt_attention_mask.bool())
    stopped = []
    for row, text in enumerate(texts):
        read = out.read_ids[row, width:][out.read_mask[row, width:]].tolist()
        sampled = out.answers[row][out.answer_mask[row]].tolist()
        at = text.find(stop)
        stopped.append(bool(out.ended[row]) and sampled[-1] != EOS)
        assert read == ([*free[row, :at].tolist(), EOS] if stopped[-1] else sampled)
    assert stopped[0]


def test_gather_is_entered_once_a_generate(name, model):
    """Also around several chunks."""
    events = []

    class Gather:
        def __enter__(self):
            events.append("in")

        def __exit__(self, *exc):
            events.append("out")

    engine = build(name, model, gather=Gather, batch_size=2)
    engine.generate(prompts(3, 4, 5, 6, 7), SAMPLED)
    assert events == ["in", "out"]


def test_bad_requests_are_refused(name, model):
    engine = build(name, model)
    right_padded = RolloutRequest(torch.tensor([[5, 6, PAD]]), torch.tensor([[1, 1, 0]]))
    empty_prompt = RolloutRequest(torch.tensor([[PAD], [5]]), torch.tensor([[0], [1]]))
    no_row = RolloutRequest(torch.zeros(0, 3).long(), torch.zeros(0, 3).long())
    for request in (right_padded, empty_prompt, no_row):
        with pytest.raises(ValueError, match=r"left-padded|without tokens"):
            engine.generate(request, SAMPLED)
    with pytest.raises(ConfigError, match="128 positions"):
        build(name, tiny_model("opt")).generate(prompts(120), SAMPLED)
    with pytest.raises(ConfigError, match="max_new_tokens 0"):
        engine.generate(prompts(3), SamplingConfig(max_new_tokens=0))


def test_bad_options_are_refused(name, model):
    """ALGORITHM 1: pad and EOS must exist and differ."""
    with pytest.raises(RequirementError, match="pad token 1 and EOS token 1"):
        build(name, model, SimpleNamespace(pad_token_id=1, eos_token_id=1))
    with pytest.raises(RequirementError, match="needs both"):
        build(name, model, SimpleNamespace(pad_token_id=None, eos_token_id=1))
    with pytest.raises(ConfigError, match="batch_size 0"):
        build(name, model, batch_size=0)
    with pytest.raises(ConfigError, match="empty"):
        build(name, model, stop=[""])


def test_unknown_engine_names_the_nearest(model):
    with pytest.raises(ConfigError, match="did you mean 'continuous'"):
        build("continous", model)
    with pytest.raises(ConfigError, match="choose one of"):
        build("xyz", model)


def test_vllm_that_is_not_there_is_explained(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequirementError, match=r"pip install vllm.*continuous"):
        build("vllm", model)
    with pytest.raises(ConfigError, match="gather"):
        build("vllm", model, lockstep=True)


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, True), (torch.bfloat16, False)])
def test_only_fp32_log_probs_of_the_policy_itself_are_exact(dtype, exact):
    """What the trainer may take as old log-probs."""
    out = build("continuous", tiny_model("llama").to(dtype)).generate(prompts(3, 4), SAMPLED)
    assert out.exact is exact
    assert out.sampler_log_probs is None
    assert not build("hybrid", tiny_model("llama")).generate(prompts(3, 4), SAMPLED).exact


def test_the_models_generation_defaults_do_not_count(name):
    """ALGORITHM 14: a repetition penalty or another EOS of the model's is not sampled with."""
    model, request = tiny_model("llama"), prompts(5, 2, 9)
    expected = build(name, model).generate(request, GREEDY)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.eos_token_id = int(expected.answers[0, 0])
    config = model.generation_config
    out = build(name, model).generate(request, GREEDY)
    assert torch.equal(out.input_ids, expected.input_ids)
    assert model.generation_config is config


def test_module_modes_come_back_from_an_engine_with_its_own_switch(name, model):
    """An engine that is a module, as DeepSpeed's are: mixed modes inside survive train()."""
    engine = torch.nn.Module()
    engine.module = engine_of(model).module
    engine.train()
    model.lm_head.eval()
    modes = [part.training for part in engine.modules()]
    build_rollout(name, engine, IDS, batch_size=2).generate(prompts(3, 4), SAMPLED)
    assert modes == [part.training for part in engine.modules()]
    assert True in modes
    assert False in modes
    model.eval()
