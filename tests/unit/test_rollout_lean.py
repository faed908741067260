"""Our own forward: which models it takes, that it is used, that it sees changed weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.rollout import SamplingConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.rollout import ContinuousRollout
from rlhf.rollout.blocks import network
from rlhf.rollout.forward import ModuleForward, forward_of
from rlhf.rollout.lean import LeanForward
from rlhf.rollout.packing import Packed, can_pack, packed_linears
from tests.unit.rollout_support import (
    FAMILIES,
    IDS,
    VOCAB,
    engine_of,
    fresh_log_probs,
    prompts,
    tiny_model,
)

LEAN = {"opt", "gpt2", "llama", "mistral", "qwen2", "qwen3"}
SAMPLED = SamplingConfig(max_new_tokens=6)


def used(model, **options):
    with forward_of(model, **{"lean": True, "whole": True} | options) as forward:
        return type(forward)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_have_a_forward_of_ours(family):
    model = tiny_model(family)
    assert used(model) is (LeanForward if family in LEAN else ModuleForward)
    assert used(model, lean=False) is ModuleForward
    assert used(model, whole=False) is ModuleForward


def unsupported():
    def llama(**changes):
        config = AutoConfig.for_model("llama", vocab_size=VOCAB, **FAMILIES["llama"])
        for name, value in changes.items():
            setattr(config, name, value)
        return AutoModelForCausalLM.from_config(config).eval()

    opt = AutoConfig.for_model("opt", vocab_size=VOCAB, **FAMILIES["opt"])
    opt.do_layer_norm_before = False
    window = AutoConfig.for_model("mistral", vocab_size=VOCAB, **FAMILIES["llama"])
    window.sliding_window = 3
    quantised = tiny_model("llama")

    class Other(nn.Linear):
        pass

    quantised.model.layers[1].mlp.up_proj = Other(32, 48, bias=False)
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return {
        "post-norm": AutoModelForCausalLM.from_config(opt).eval(),
        "window": AutoModelForCausalLM.from_config(window).eval(),
        "other linear": quantised,
        "dynamic rope": llama(rope_parameters=dynamic),
    }


@pytest.mark.parametrize("what", ["post-norm", "window", "other linear", "dynamic rope"])
def test_what_it_does_not_do_runs_through_the_model(what):
    model = unsupported()[what]
    assert network(model) is None
    engine = ContinuousRollout(engine_of(model), IDS, batch_size=3)
    out = engine.generate(prompts(7, 2, 9), SAMPLED)
    assert (out.log_probs - fresh_log_probs(model, out, 1.0))[out.answer_mask].abs().max() < 1e-5


def test_scaled_rope_and_biases():
    """llama3's scaled angles, biased projections, and an own scale."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        **FAMILIES["llama"],
        rope_parameters=rope | {"original_max_position_embeddings": 16},
        attention_bias=True,
        mlp_bias=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.7
    assert used(model) is LeanForward
    engine = ContinuousRollout(engine_of(model), IDS, batch_size=3)
    out = engine.generate(prompts(20, 2, 9), SAMPLED)
    assert (out.log_probs - fresh_log_probs(model, out, 1.0))[out.answer_mask].abs().max() < 1e-5


def test_each_rollout_packs_the_weights_of_its_time():
    """A training step between two rollouts is seen by the second."""
    model = tiny_model("llama")
    engine = ContinuousRollout(engine_of(model), IDS, batch_size=3)
    engine.generate(prompts(7, 2, 9), SAMPLED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.8)
    out = engine.generate(prompts(7, 2, 9), SAMPLED)
    assert (out.log_probs - fresh_log_probs(model, out, 1.0))[out.answer_mask].abs().max() < 1e-5


def test_pads_are_not_computed():
    """Prompts of 9, 3 and 1 tokens: 13 rows in the first layer, 3 after the last attention."""
    rows = []
    with forward_of(tiny_model("llama"), lean=True, whole=True) as forward:
        for block in forward._parts.blocks:
            qkv, down = block.qkv, block.down
            block.qkv = lambda x, qkv=qkv: rows.append(len(x)) or qkv(x)
            block.down = SimpleNamespace(
                added_to=lambda a, b, down=down: rows.append(len(b)) or down.added_to(a, b)
            )
        request = prompts(9, 3, 1)
        forward.prefill(request.prompt_ids, request.prompt_attention_mask.bool())
    assert rows == [13, 13, 13, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_packed_products(dtype, rows, monkeypatch):
    """Two layers as one, one without bias, packed and not; with a residual."""
    torch.manual_seed(0)
    first, second = nn.Linear(24, 10).to(dtype), nn.Linear(24, 7, bias=False).to(dtype)
    x, residual = torch.randn(rows, 24, dtype=dtype), torch.randn(rows, 17, dtype=dtype)
    expected = torch.cat((first(x), second(x)), dim=1).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    parts = ([first.weight, second.weight], [first.bias, None])
    with torch.no_grad():
        packed = Packed(*parts)
        monkeypatch.setattr("rlhf.rollout.packing.can_pack", lambda weight: False)
        for one in (packed, Packed(*parts)):
            assert torch.allclose(one(x).float(), expected, atol=tolerance)
            total = one.added_to(residual, x).float()
            assert torch.allclose(total, expected + residual.float(), atol=tolerance)


def test_packed_linears_come_and_go():
    """Below peft's adapters too; another one's patch is left alone."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("gemma2"), peft.LoraConfig(r=2, target_modules="all-linear")
    ).eval()
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    theirs = linears[3].forward = lambda x: x
    with packed_linears(model):
        assert sum("forward" in vars(m) for m in linears) == len(linears)
        assert linears[3].forward is theirs
        x = torch.randn(2, 3, linears[0].in_features)
        assert torch.allclose(linears[0](x), nn.Linear.forward(linears[0], x), atol=1e-5)
    assert [m for m in linears if "forward" in vars(m)] == [linears[3]]


def test_other_dtypes_are_not_packed():
    assert can_pack(torch.zeros(2, 2))
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float64))
