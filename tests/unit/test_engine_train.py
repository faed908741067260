"""rlhf.engine.train with real DeepSpeed engines in a world of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.schema import EngineConfig
from rlhf.engine import comm
from rlhf.engine.ema import WeightEMA
from rlhf.engine.memory import peak_memory
from rlhf.engine.ops import announce_compile
from rlhf.engine.train import FrozenEngine
from rlhf.errors import UserError
from step1_sft.main import sft_step
from tests.unit import model_help as help_


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


def run(model: Any, micro: int, count: int = 3, **settings: Any) -> tuple[list[Any], Any]:
    """Stats of `count` SFT steps over the same eight rows, and the engine."""
    engine = help_.train_engine(model, **settings)
    rows = help_.sft_rows()
    return [sft_step(engine, help_.sft_batches(rows, micro)) for _ in range(count)], engine


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of the mean loss over all counted tokens of the eight rows, by plain autograd."""
    hf, nll, tokens = model.model, 0.0, 0
    for row in help_.sft_rows():
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        log_probs = hf(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        nll = nll - log_probs[:, len(row["prompt_ids"]) - 1 :].sum()
        tokens += len(row["answer_ids"])
    (nll / tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_the_step_is_the_textbook_step() -> None:
    """30, 3: loss, gradient norm and AdamW's first step equal plain torch's on whole rows."""
    reference = help_.load_policy()
    grads = gradients(reference)
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    for parameter in reference.parameters():
        parameter.grad.mul_(1.0 / float(norm) if float(norm) > 1.0 else 1.0)
    torch.optim.AdamW(
        reference.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0
    ).step()
    (stats,), engine = run(help_.load_policy(), 8, count=1)
    assert float(norm) > 1.0, "clipping is active"
    assert stats["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert stats["learning_rate"] == 1e-2
    for (name, ours), plain in zip(
        engine.module.named_parameters(), reference.parameters(), strict=True
    ):
        # AdamW's first step is 1e-2 * g / (|g| + 1e-5): rounding shows where g is near 1e-6.
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [0, 2])
def test_accumulation_changes_nothing(stage: int) -> None:
    """30: 1 x 8 and 4 x 2 rows give the same losses, gradient norms and weights after 3 steps."""
    settings = EngineConfig(zero_stage=stage)
    whole, one = run(help_.load_policy(engine=settings), 8, engine=settings)
    parts, four = run(help_.load_policy(engine=settings), 2, engine=settings)
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, abs=1e-6, rel=1e-6)
    weights = help_.weights(one.module)
    for name, tensor in help_.weights(four.module).items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=0)
    assert whole[0]["loss"] > whole[2]["loss"] + 0.1, "it learns"


@pytest.mark.parametrize("stage", [0, 2])
def test_no_clipping_means_none(stage: int) -> None:
    """L4: max_grad_norm 0 does not clip, though DeepSpeed's default clips to 1. With SGD a step is
    proportional to the gradient, so clipping would show."""
    from rlhf.engine import train

    def step(limit: float) -> tuple[float, float]:
        model = help_.load_policy()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        original = train.build_optimizer
        train.build_optimizer = lambda groups, *_, **__: torch.optim.SGD(list(groups), lr=1e-3)
        try:
            (stats,), engine = run(
                model, 8, count=1, engine=EngineConfig(zero_stage=stage), max_grad_norm=limit,
                learning_rate=1e-3,
            )  # fmt: skip
        finally:
            train.build_optimizer = original
        moved = [(p - before[n]).norm() for n, p in engine.module.named_parameters()]
        return stats["grad_norm"], float(torch.stack(moved).detach().norm()) / 1e-3

    norm, moved = step(0.0)
    assert norm > 1.01
    assert moved == pytest.approx(norm, rel=1e-3)
    clipped_norm, moved = step(0.25)
    assert clipped_norm == pytest.approx(norm, rel=1e-5), "the norm before clipping is reported"
    assert moved == pytest.approx(0.25, rel=1e-3)


def test_training_mode_from_the_first_step() -> None:
    """18 (the other side): `from_pretrained` leaves evaluation mode on, in which neither dropout
    nor gradient checkpointing works."""
    engine = help_.train_engine(help_.load_policy("gpt2", dropout=True))
    assert all(part.training for part in engine.module.modules())
    with engine.evaluating():
        assert not any(part.training for part in engine.module.modules())
        assert not torch.is_grad_enabled()
    assert all(part.training for part in engine.module.modules())


def test_gradient_checkpointing_recomputes_and_agrees() -> None:
    """The remedy for too little memory is real: layers run again in backward, same gradients."""
    plain, _ = run(help_.load_policy(), 8, count=1)
    model = help_.load_policy(gradient_checkpointing=True)
    calls = []
    model.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    again, _ = run(model, 8, count=1)
    assert len(calls) == 2, "once forward, once recomputed"
    assert again[0] == pytest.approx(plain[0], rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_leaves_the_base_bits(family: str) -> None:
    """L2: training adapters changes no bit of the base; the adapters do change."""
    model = help_.load_policy(family, lora={"rank": 2})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stats, engine = run(model, 4)
    assert stats[2]["loss"] < stats[0]["loss"]
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_bf16_stage_0_follows_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/decisions/0003: the loss in bf16 stays near fp32's; master weights are fp32 (33)."""
    exact, _ = run(help_.load_policy(), 4, learning_rate=3e-3)
    rounded, engine = run(
        help_.load_policy(dtype="bfloat16"), 4, dtype="bfloat16", learning_rate=3e-3
    )
    for a, b in zip(exact, rounded, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=5e-2)
    assert next(engine.module.parameters()).dtype == torch.bfloat16
    assert engine.config["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_is_not_finite_stops_training(stage: int) -> None:
    """A diverged model is never published: the step raises with a remedy."""
    engine = help_.train_engine(help_.load_policy(), engine=EngineConfig(zero_stage=stage))
    weight = next(engine.module.parameters())
    batches = help_.sft_batches(help_.sft_rows(), 8)

    def bad(_: Any) -> torch.Tensor:
        return weight.sum() * float("nan")

    with pytest.raises(UserError, match=r"loss is nan.*learning rate"):
        engine.step(batches, bad)


def test_frozen_engines_have_no_gradients() -> None:
    engine = FrozenEngine(help_.load_policy(), EngineConfig(), dtype="float32")
    batch = help_.sft_batches(help_.sft_rows(2), 2)[0]
    log_probs, _ = engine(batch.input_ids, batch.attention_mask, batch.attention_mask)
    assert not log_probs.requires_grad
    assert not any(part.training for part in engine.module.modules())
    assert not any(p.requires_grad for p in engine.module.parameters())


def test_learning_rate_follows_the_schedule() -> None:
    stats, engine = run(help_.load_policy(), 8, steps=4)
    assert [s["learning_rate"] for s in stats] == pytest.approx([0.01, 0.0075, 0.005])
    assert engine.learning_rate == pytest.approx(0.0025)


def test_ema_by_hand() -> None:
    """36: average <- d average + (1 - d) weight after each step; swapping leaves the model."""
    engine = help_.train_engine(help_.load_policy())
    ema = WeightEMA(engine.module, 0.9)
    expected = help_.weights(engine.module)
    for _ in range(2):
        sft_step(engine, help_.sft_batches(help_.sft_rows(), 8))
        ema.update()
        now = help_.weights(engine.module)
        expected = {k: 0.9 * expected[k] + 0.1 * now[k] for k in now}
    inside: dict[str, torch.Tensor] = {}

    def fail_inside() -> None:
        with ema.swapped_in():
            inside.update(help_.weights(engine.module))
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    for name, tensor in help_.weights(engine.module).items():
        torch.testing.assert_close(inside[name], expected[name], atol=1e-7, rtol=1e-6)
        assert torch.equal(tensor, now[name]), "given back, after an error too"


def test_a_world_of_one() -> None:
    assert (comm.rank(), comm.world_size()) == (0, 1)
    assert comm.sum_over_ranks({"b": 2, "a": 0.5}) == {"a": 0.5, "b": 2.0}
    assert comm.sum_over_ranks({}) == {}
    assert comm.gather_lists([1, "x"]) == [1, "x"]
    with comm.rank_zero_first():
        pass
    comm.barrier()
    assert peak_memory() > 1e8  # torch alone takes more


def test_the_compile_is_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 2: the one-time compile of DeepSpeed's CPU ops is announced, not silent."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    announce_compile("none")
    assert capsys.readouterr().out == ""
    announce_compile("cpu")
    assert "cpu_adam" in capsys.readouterr().out
    (tmp_path / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    (tmp_path / "py311_cpu" / "cpu_adam" / "cpu_adam.so").touch()
    announce_compile("cpu")
    assert capsys.readouterr().out == ""
