"""Rollout engines on a GPU: our own, DeepSpeed's, and DeepSpeed's with its inference kernels."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig

from rlhf.algo.logprobs import log_probs_from_hidden
from rlhf.config.schema import EngineConfig, OptimConfig
from rlhf.engine.train import TrainEngine
from rlhf.models.tiny import build_tiny
from rlhf.rollout import build_rollout, gathering, graphs, slab
from step1_sft.main import sft_step
from tests.unit import model_help as help_
from tests.unit.rollout_support import (
    EOS,
    FAMILIES,
    PAD,
    engine_of,
    fresh_log_probs,
    hf_greedy,
    prompts,
    spread_eos,
    tiny_model,
)

pytestmark = pytest.mark.gpu
LENGTHS = (9, 3, 12, 1, 7, 12, 2)
GREEDY = SamplingConfig(max_new_tokens=24, temperature=0.0)
SAMPLED = SamplingConfig(max_new_tokens=12)


def on(device: torch.device, request: RolloutRequest) -> RolloutRequest:
    return RolloutRequest(request.prompt_ids.to(device), request.prompt_attention_mask.to(device))


def build(name: str, model: Any, eos: int = EOS, **options: Any) -> Any:
    ids = SimpleNamespace(pad_token_id=PAD, eos_token_id=eos)
    return build_rollout(name, engine_of(model), ids, **{"batch_size": 4} | options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["continuous", "unrecorded", "plain", "hybrid"])
def test_greedy_is_what_the_model_generates_on_a_cpu(
    gpu: torch.device, family: str, name: str
) -> None:
    """Token for token in fp32, left-padded, with ends at different places."""
    model, request = tiny_model(family), prompts(*LENGTHS)
    eos = spread_eos(hf_greedy(model, request, 24, None))
    expected = hf_greedy(model, request, 24, eos)
    model.to(gpu)
    options: dict[str, Any] = {"plain": {"lean": False}, "unrecorded": {"graphs": False}}
    engine = "continuous" if name in options else name
    out = build(engine, model, eos, **options.get(name, {})).generate(on(gpu, request), GREEDY)
    assert out.answers.device.type == gpu.type
    answers = out.answers.cpu()
    assert torch.equal(answers, expected[:, : answers.shape[1]])
    assert torch.equal(out.ended.cpu(), (expected == eos).any(1))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_a_seed_gives_the_cpus_answers(gpu: torch.device, family: str) -> None:
    """Numbers are drawn on the CPU: in fp32 the same answers are sampled, with their log-probs."""
    model, request = tiny_model(family), prompts(*LENGTHS)
    sampling = replace(SAMPLED, temperature=0.8, n_samples_per_prompt=3)
    wanted = build("continuous", model, seed=7).generate(request, sampling)
    model.to(gpu)
    found = build("continuous", model, seed=7).generate(on(gpu, request), sampling)
    assert torch.equal(found.answers.cpu(), wanted.answers)
    torch.testing.assert_close(found.log_probs.cpu(), wanted.log_probs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
def test_log_probs_are_a_fresh_forwards(gpu: torch.device, dtype: torch.dtype, lean: bool) -> None:
    model = tiny_model("llama").to(gpu, dtype)
    out = build("continuous", model, lean=lean).generate(on(gpu, prompts(*LENGTHS)), SAMPLED)
    fresh = fresh_log_probs(model, out, 1.0)
    allowed = {torch.float32: 2e-4, torch.bfloat16: 0.4, torch.float16: 0.05}[dtype]
    apart = (out.log_probs - fresh)[out.answer_mask].abs()
    assert float(apart.max()) < allowed


def test_steps_are_recorded_and_follow_the_cache(
    only_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA graphs are used, again after the cache has moved, and give what single calls give."""
    model = tiny_model("llama").to(only_gpu)
    request = on(only_gpu, prompts(*LENGTHS, *LENGTHS, *LENGTHS))
    sampling = replace(SAMPLED, max_new_tokens=70)
    recorded: list[int] = []
    record = graphs.GraphForward._record

    def counted(self: Any, tokens: torch.Tensor, *others: Any) -> Any:
        recorded.append(len(tokens))
        return record(self, tokens, *others)

    monkeypatch.setattr(graphs.GraphForward, "_record", counted)
    monkeypatch.setattr(slab, "GROW_ON_GPU", 16)
    eos = int(hf_greedy(model, request, 40, None)[0, 12])
    found = build("continuous", model, eos, batch_size=9).generate(request, sampling)
    assert len(recorded) >= 4, "at the beginning, and when 16 columns are full"
    monkeypatch.undo()
    wanted = build("continuous", model, eos, batch_size=9, graphs=False)
    torch.testing.assert_close(found.answers, wanted.generate(request, sampling).answers)


def test_hybrid_leaves_the_random_state(gpu: torch.device) -> None:
    """Its sampling is seeded by itself: the same answers twice, and torch's state is untouched."""
    model = tiny_model("llama").to(gpu)
    torch.manual_seed(5)
    wanted = torch.rand(3, device=gpu)
    torch.manual_seed(5)
    request = on(gpu, prompts(*LENGTHS))
    one = build("hybrid", model, seed=3).generate(request, SAMPLED)
    assert torch.equal(torch.rand(3, device=gpu), wanted)
    two = build("hybrid", model, seed=3).generate(request, SAMPLED)
    assert torch.equal(one.answers, two.answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_and_loss_in_pieces(gpu: torch.device, dtype: torch.dtype) -> None:
    """Log-probs and gradients are those of all logits at once in fp64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 64, generator=generator).to(gpu, dtype).requires_grad_()
    weight = (torch.randn(4096, 64, generator=generator) / 8).to(gpu, dtype).requires_grad_()
    targets = torch.randint(0, 4096, (700,), generator=generator).to(gpu)
    found, entropy = log_probs_from_hidden(
        hidden, lambda rows: rows @ weight.T, targets, temperature=0.7, with_entropy=True
    )
    (found.sum() + entropy.sum()).backward()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    logs = (exact_hidden @ exact_weight.T / 0.7).log_softmax(-1)
    wanted = logs.gather(1, targets[:, None]).squeeze(1)
    (wanted.sum() - (logs.exp() * logs).sum()).backward()
    allowed = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, exact in (
        (found, wanted), (hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad),
    ):  # fmt: skip
        assert float((ours.double() - exact).norm() / exact.norm()) < allowed


@pytest.mark.parametrize("how", ["always", "never"])
def test_sharded_weights_answer_as_whole_ones(gpu: torch.device, how: str) -> None:
    """ZeRO-3 on one GPU: answers are those at ZeRO-0, and training goes on after them."""
    ids = torch.randint(3, 200, (5, 6), generator=torch.Generator().manual_seed(4)).to(gpu)
    request, answers = RolloutRequest(ids, torch.ones_like(ids)), []
    for stage in (0, 3):
        settings = EngineConfig(zero_stage=stage)
        engine = help_.train_engine(
            help_.load_policy(name=help_.lively(), engine=settings), engine=settings
        )
        sampler = build_rollout(
            "continuous", engine.deepspeed, help_.tokenizer(), batch_size=2, seed=1,
            **gathering(how, "continuous", engine.module).options,
        )  # fmt: skip
        with engine.evaluating():
            answers.append(sampler.generate(request, SAMPLED).input_ids)
        rows = help_.sft_batches(help_.sft_rows(4), 2)
        sft_step(engine, [batch.to(engine.device) for batch in rows])
    assert torch.equal(*answers)


@functools.cache
def sized_opt() -> str:
    """A random OPT with heads of 64, as real ones have."""
    path = help_.scratch() / "sized-opt"
    size = {"hidden": 256, "layers": 2, "heads": 4, "mlp": 512, "positions": 96}
    build_tiny("opt", help_.TEXTS, path, seed=3, vocab_size=300, size=size)
    module = help_.load_policy("opt", name=str(path))
    help_.spread(module, scale=0.08)
    module.model.save_pretrained(path)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_deepspeeds_kernels_answer_as_the_model_does(
    only_gpu: torch.device, stage: int, dtype: str
) -> None:
    """`step3.rollout.hybrid_kernels`: DeepSpeedHybridEngine, before and after a step of training.

    Compiles DeepSpeed's inference kernels at the first use. Other families than OPT are refused:
    there the kernels end the process, or leave the GPU in a state that fails all that follows.
    """
    family, path = "opt", sized_opt()
    settings = EngineConfig(zero_stage=stage)
    module = help_.load_policy(family, name=path, dtype=dtype, engine=settings)
    plain = help_.load_policy(family, name=path, dtype=dtype).to(only_gpu).eval()
    engine = TrainEngine(
        module, settings, OptimConfig(learning_rate=1e-3), dtype=dtype,
        total_steps=10, hybrid_max_tokens=64,
    )  # fmt: skip
    assert type(engine.deepspeed).__name__ == "DeepSpeedHybridEngine"
    ids = torch.randint(3, 200, (16, 6), generator=torch.Generator().manual_seed(4))
    request = RolloutRequest(ids.to(only_gpu), torch.ones_like(ids).to(only_gpu))
    sampler = build_rollout(
        "hybrid", engine.deepspeed, help_.tokenizer(family), batch_size=16, seed=1
    )
    wanted = hf_greedy(plain.model, request, 2, None)
    found = sampler.generate(request, replace(GREEDY, max_new_tokens=2)).answers
    same = (found == wanted[:, : found.shape[1]]).float().mean()
    assert float(same) > 0.8, "16 bits may turn a tie"
    rows = help_.sft_batches(help_.sft_rows(4), 2)
    before = help_.weights(engine.module)
    sft_step(engine, [batch.to(engine.device) for batch in rows])
    after = help_.weights(engine.module)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    sampler.generate(request, replace(GREEDY, max_new_tokens=8))
