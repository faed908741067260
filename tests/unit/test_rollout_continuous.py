"""The continuous engine: exact for every family, whatever retires, joins or moves."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig
from transformers import AttentionInterface

import rlhf.rollout.attention as attention
import rlhf.rollout.continuous as continuous
import rlhf.rollout.probe as probe
import rlhf.rollout.slab as slab
from rlhf.errors import UserError
from rlhf.rollout import ContinuousRollout
from rlhf.rollout.attention import NAME, decode_attention, lean_attention
from tests.unit.rollout_support import (
    EOS,
    FAMILIES,
    IDS,
    PAD,
    VOCAB,
    Wrapper,
    engine_of,
    fresh_log_probs,
    hf_greedy,
    prompts,
    spread_eos,
    tiny_model,
)

LENGTHS = (9, 3, 12, 1, 7, 12, 2)
SAMPLED = SamplingConfig(max_new_tokens=12)


def build(model, eos=EOS, **options):
    ids = SimpleNamespace(pad_token_id=PAD, eos_token_id=eos)
    return ContinuousRollout(engine_of(model), ids, **{"batch_size": 4} | options)


@pytest.fixture(params=[True, False], ids=["lean", "plain"])
def lean(request):
    """Our own forward and packed weights, or the model's own."""
    return request.param


@pytest.mark.parametrize("samples", [1, 3])
def test_answers_do_not_depend_on_the_number_of_ranks(samples):
    """ALGORITHM 19: two ranks, each with every other prompt, answer as one does, call after call;
    any of them can go on from another's state."""
    model, sampling = tiny_model("llama"), replace(SAMPLED, n_samples_per_prompt=samples)
    whole = prompts(5, 2, 9, 4)
    half = [
        RolloutRequest(whole.prompt_ids[rank::2], whole.prompt_attention_mask[rank::2])
        for rank in (0, 1)
    ]
    one = build(model, seed=3)
    two = [build(model, seed=3, rank=rank, world=2) for rank in (0, 1)]
    for _ in range(2):
        expected = one.generate(whole, sampling).answers.unflatten(0, (4, samples))
        assert not torch.equal(expected[0], expected[1])
        for rank in (0, 1):
            found = two[rank].generate(half[rank], sampling).answers
            wanted = expected[rank::2].flatten(0, 1)[:, : found.shape[1]]
            assert torch.equal(found, wanted)
    states = [engine.state_dict()["generator"] for engine in (one, *two)]
    assert all(torch.equal(states[0], other) for other in states)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family, lean):
    """ALGORITHM 13: token for token, left-padded, ends mixed, in any batch size."""
    model, request, limit = tiny_model(family), prompts(*LENGTHS), 24
    eos = spread_eos(hf_greedy(model, request, limit, None))
    expected = hf_greedy(model, request, limit, eos)
    assert len({int((row == PAD).sum()) for row in expected}) >= 3, "ends must be mixed"
    assert len(expected.unique()) > 10, "answers must vary"
    for batch_size in (1, 3, 7):
        sampling = SamplingConfig(max_new_tokens=limit, temperature=0.0)
        out = build(model, eos, batch_size=batch_size, lean=lean).generate(request, sampling)
        width = out.answers.shape[1]
        assert torch.equal(out.answers, expected[:, :width])
        assert (expected[:, width:] == PAD).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_columns_change_nothing(family, monkeypatch):
    """As in 16 bits, where attention reads columns that nothing is written to yet."""
    monkeypatch.setattr(slab, "Span", lambda dense: whole_span(dense=True))
    test_greedy_equals_generate(family, lean=False)


whole_span = slab.Span


def test_in_16_bits_attention_keeps_its_shape(monkeypatch):
    """oneDNN compiles a product for every shape: not one a token (0.5 MB each, for good)."""
    widths = set()

    def seen(module, query, key, *rest, **options):
        widths.add(key.shape[2])
        return decode_attention(module, query, key, *rest, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, seen)
    model = tiny_model().to(torch.bfloat16)
    sampling = SamplingConfig(max_new_tokens=40)
    engine = build(model, eos=VOCAB, lean=False, batch_size=7)
    engine.generate(prompts(3), SamplingConfig(max_new_tokens=1))  # the model is tried (probe.py)
    widths.clear()
    engine.generate(prompts(*LENGTHS), sampling)
    assert widths - {12} == {12 + slab.GROW, 12 + 2 * slab.GROW}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.7, "top_k": 8, "top_p": 0.9}], ids=str)
def test_log_probs_equal_a_fresh_forward(family, filters, lean):
    """ALGORITHM 14, 15, 20: temperature in, filters out, to fp32's rounding of logits near 50."""
    model = tiny_model(family)
    sampling = replace(SAMPLED, n_samples_per_prompt=2, **filters)
    out = build(model, lean=lean).generate(prompts(*LENGTHS), sampling)
    fresh = fresh_log_probs(model, out, sampling.temperature)
    assert out.log_probs.dtype == torch.float32
    assert (out.log_probs - fresh)[out.answer_mask].abs().max() < 3e-5
    assert (out.log_probs[~out.answer_mask] == 0).all()


def test_greedy_log_probs_are_those_of_temperature_one():
    model = tiny_model("opt")
    out = build(model).generate(prompts(*LENGTHS), replace(SAMPLED, temperature=0.0))
    fresh = fresh_log_probs(model, out, 1.0)
    assert (out.log_probs - fresh)[out.answer_mask].abs().max() < 1e-5


@pytest.fixture
def moves(monkeypatch):
    """One column at a time, and a list of whether each step moved the live columns."""
    seen = []
    original = slab.Slab.make_room

    def counted(this):
        before = this.span.end
        original(this)
        seen.append(this.span.end < before)

    monkeypatch.setattr(slab.Slab, "make_room", counted)
    monkeypatch.setattr(slab, "GROW", 1)
    return seen


@pytest.mark.parametrize("family", ["gemma3_text", "opt", "bloom"])
def test_answers_do_not_depend_on_batch_size(family, moves):
    """Rows that join late and columns that move change nothing: each token's random number
    belongs to its row and position."""
    model, request = tiny_model(family), prompts(*LENGTHS)
    eos = spread_eos(hf_greedy(model, request, 20, None))
    sampling = replace(SAMPLED, max_new_tokens=20, n_samples_per_prompt=2)
    whole = build(model, eos, batch_size=100, seed=5).generate(request, sampling)
    assert len(set(whole.answer_mask.sum(1).tolist())) > 1
    for batch_size in (2, 5):
        out = build(model, eos, batch_size=batch_size, seed=5).generate(request, sampling)
        assert torch.equal(whole.input_ids, out.input_ids)
        assert torch.allclose(whole.log_probs, out.log_probs, atol=1e-5)
    assert any(moves), "the case must move columns"


def test_a_prompt_is_prefilled_once_and_ended_rows_cost_nothing():
    """7 prompts x 3 samples: 7 rows prefilled; a row is decoded once per token after the first."""
    model = tiny_model("llama", seed=3)
    eos = spread_eos(hf_greedy(model, prompts(*LENGTHS), 24, None))
    sampling = replace(SAMPLED, max_new_tokens=24, n_samples_per_prompt=3)
    engine = build(model, eos, batch_size=6)
    out = engine.generate(prompts(*LENGTHS), sampling)
    assert engine.stats.prefilled_rows == 7
    assert engine.stats.prefills > 1
    assert engine.stats.decoded_rows == int(out.answer_mask.sum()) - 21
    assert engine.stats.decodes < engine.stats.decoded_rows / 3


def test_the_batch_is_never_larger_than_asked():
    """Also where n samples do not divide it, or exceed it."""
    seen = []
    model = tiny_model("llama")
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for batch_size, samples in ((5, 2), (3, 7)):
        seen.clear()
        sampling = replace(SAMPLED, n_samples_per_prompt=samples)
        engine = build(model, batch_size=batch_size, lean=False)
        engine.generate(prompts(*LENGTHS), sampling)
        assert max(seen) == batch_size // samples * samples or max(seen) == batch_size


def test_logits_are_made_for_the_last_position_only():
    """Nothing of size prompt x vocabulary is held."""
    model, lengths = tiny_model("opt"), []
    build(model, lean=False).generate(prompts(3), SAMPLED)  # the model is tried (probe.py)
    model.lm_head.register_forward_hook(lambda *a: lengths.append(a[2].shape[1]))
    build(model, lean=False).generate(prompts(*LENGTHS), SAMPLED)
    assert set(lengths) == {1}


def test_lockstep_ranks_call_forward_equally_often(monkeypatch):
    """Two ranks with unequal work, as threads; without lockstep they differ."""
    barrier, flags = threading.Barrier(2, timeout=30), [False, False]

    def any_rank(flag, device):
        rank = int(threading.current_thread().name)
        flags[rank] = flag
        barrier.wait()
        result = any(flags)
        barrier.wait()
        return result

    monkeypatch.setattr(continuous, "_any_rank", any_rank)

    def run(lockstep):
        calls, outs = [0, 0], [None, None]

        def work(rank):
            model = tiny_models[rank]
            count = lambda *_: calls.__setitem__(rank, calls[rank] + 1)
            hook = model.register_forward_pre_hook(count)
            engine = build(model, rank=rank, world=2, batch_size=2, lockstep=lockstep, lean=False)
            outs[rank] = engine.generate(prompts(*LENGTHS[: 2 + 3 * rank]), SAMPLED)
            hook.remove()

        threads = [threading.Thread(target=work, args=(r,), name=str(r)) for r in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return calls, outs

    tiny_models = [tiny_model("opt"), tiny_model("opt")]
    for model in tiny_models:  # each is tried first (probe.py)
        build(model, lean=False).generate(prompts(3), SAMPLED)
    free_calls, free = run(False)
    calls, outs = run(True)
    assert free_calls[0] < free_calls[1]
    assert calls[0] == calls[1] == max(free_calls)
    for one, other in zip(free, outs, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)


def test_peft_wrapped_model():
    """The policy with adapters is what samples and is scored."""
    peft = pytest.importorskip("peft")
    base = tiny_model("llama")
    with torch.no_grad():  # logits of size 30 would measure fp32's rounding
        base.lm_head.weight.mul_(0.2)
    plain = build(base).generate(prompts(*LENGTHS), replace(SAMPLED, temperature=0.0))
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    out = build(model).generate(prompts(*LENGTHS), replace(SAMPLED, temperature=0.0))
    assert not torch.equal(plain.answers, out.answers)
    fresh = fresh_log_probs(model, out, 1.0)
    assert (out.log_probs - fresh)[out.answer_mask].abs().max() < 1e-5


def test_a_bare_model_is_accepted_as_module():
    model = tiny_model("gpt2")
    bare = ContinuousRollout(SimpleNamespace(module=model), IDS, batch_size=4)
    expected = build(model).generate(prompts(4, 5), SAMPLED)
    assert torch.equal(bare.generate(prompts(4, 5), SAMPLED).input_ids, expected.input_ids)


def test_stateful_models_read_the_whole_row_again():
    """A recurrent state cannot be cut into rows: every token is a forward over all of them."""
    model = tiny_model("llama")
    expected = build(model).generate(prompts(*LENGTHS), SAMPLED)
    model._is_stateful = True
    out = build(model, lean=False).generate(prompts(*LENGTHS), SAMPLED)
    assert list(probe._chosen[model].values())[-1] == "read again for every token"
    assert torch.equal(out.answers, expected.answers)
    torch.testing.assert_close(out.log_probs, expected.log_probs, atol=1e-5, rtol=0)


def test_diverged_weights_are_reported():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        build(model).generate(prompts(3), SAMPLED)


@pytest.mark.parametrize("family", ["opt", "llama", "gemma3_text", "gpt2"])
def test_bfloat16_log_probs(family, lean):
    """Half precision on CPU runs our decode attention: log-probs stay within bf16's rounding."""
    model = tiny_model(family)
    with torch.no_grad():  # logits of size 10 would only measure the rounding of bf16
        model.get_output_embeddings().weight.mul_(0.1)
    model = model.to(torch.bfloat16)
    used = []
    with lean_attention(model):
        used.append(model.config._attn_implementation)
    assert used == [NAME]
    assert model.config._attn_implementation == "sdpa"
    out = build(model, lean=lean).generate(prompts(*LENGTHS), SAMPLED)
    gap = (out.log_probs - fresh_log_probs(model, out, 1.0))[out.answer_mask].abs()
    assert gap.mean() < 0.02
    assert gap.max() < 0.15


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_decode_attention_equals_sdpa(groups, masked):
    """fp32, grouped heads, a strided view of a slab as cache."""
    torch.manual_seed(0)
    query = torch.randn(3, 4, 1, 8)
    slab = torch.randn(2, 5, groups, 20, 8)
    key, value = slab[0][:3, :, 2:13], slab[1][:3, :, 2:13]
    mask = (
        (torch.arange(11) >= torch.tensor([0, 4, 10])[:, None])[:, None, None] if masked else None
    )
    ours, _ = decode_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    repeat = 4 // groups
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(repeat, 1),
        value.repeat_interleave(repeat, 1),
        attn_mask=mask,
        scale=0.3,
    )
    assert torch.allclose(ours, theirs.transpose(1, 2), atol=1e-5)


def test_only_the_wrapped_model_is_called():
    """The wrapper may have any forward: it is not used."""
    model = tiny_model("llama")
    wrapper = Wrapper(model)
    wrapper.forward = None
    engine = ContinuousRollout(SimpleNamespace(module=wrapper), IDS, batch_size=2)
    assert engine.generate(prompts(3), SAMPLED).batch_size == 1
