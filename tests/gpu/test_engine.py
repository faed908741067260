"""DeepSpeed engines on a GPU: the textbook step, 16 bits, loss scaling, checkpoints, offload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.schema import EngineConfig
from rlhf.engine import checkpoint
from rlhf.engine.memory import available_memory, peak_memory, peak_since_last
from rlhf.engine.train import FrozenEngine, TrainEngine
from rlhf.errors import UserError
from step1_sft.main import sft_step
from tests.unit import model_help as help_

pytestmark = pytest.mark.gpu
STEPS = 4


def batches(engine: Any, size: int = 4) -> list[Any]:
    found = help_.sft_batches(help_.sft_rows(), size)
    return [batch.to(engine.device) for batch in found]


def build(dtype: str, stage: int, *, rate: float = 3e-3, **settings: Any) -> TrainEngine:
    engine = EngineConfig(zero_stage=stage, **settings)
    model = help_.load_policy(dtype=dtype, engine=engine)
    return help_.train_engine(model, engine=engine, dtype=dtype, learning_rate=rate)


def run(engine: TrainEngine, count: int = STEPS) -> list[dict[str, float]]:
    return [sft_step(engine, batches(engine)) for _ in range(count)]


@pytest.fixture(scope="module")
def textbook() -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, by plain torch in fp64 on the CPU, whole rows."""
    model = help_.load_policy().double()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0
    )
    found = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 10)  # the linear schedule over ten steps
        optimizer.zero_grad()
        nll, tokens = torch.zeros((), dtype=torch.float64), 0
        for row in help_.sft_rows():
            ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
            logs = model.model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
            nll = nll - logs[:, len(row["prompt_ids"]) - 1 :].sum()
            tokens += len(row["answer_ids"])
        loss = nll / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append((loss.item(), float(norm)))
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "loss", "norm"), [("float32", 1e-4, 1e-3), ("bfloat16", 2e-2, 8e-2)]
)
def test_steps_follow_plain_torch_on_a_cpu(
    gpu: torch.device,
    textbook: list[tuple[float, float]],
    stage: int,
    dtype: str,
    loss: float,
    norm: float,
) -> None:
    """Losses and gradient norms of four steps are the textbook's within the dtype's rounding."""
    engine = build(dtype, stage)
    assert torch.device(engine.device).type == gpu.type
    assert next(engine.module.parameters()).device.type == gpu.type
    for stats, (wanted, wanted_norm) in zip(run(engine), textbook, strict=True):
        assert stats["loss"] == pytest.approx(wanted, rel=loss)
        assert stats["grad_norm"] == pytest.approx(wanted_norm, rel=norm)


def scaled(tmp_path: Path, power: int) -> str:
    path = tmp_path / "scale.json"
    path.write_text(json.dumps({"fp16": {"initial_scale_power": power, "hysteresis": 1}}))
    return str(path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_float16_with_loss_scaling_follows_fp32(
    textbook: list[tuple[float, float]], stage: int, tmp_path: Path
) -> None:
    """A loss scale of 2^8 changes neither the losses nor the norm that is reported and clipped."""
    engine = build("float16", stage, deepspeed_config=scaled(tmp_path, 8))
    for stats, (wanted, wanted_norm) in zip(run(engine), textbook, strict=True):
        assert stats["loss"] == pytest.approx(wanted, rel=1e-2)
        assert stats["grad_norm"] == pytest.approx(wanted_norm, rel=5e-2)
    assert engine.deepspeed.optimizer.loss_scale == 2**8


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_float16_overflow_skips_its_step_and_halves_the_scale(stage: int, tmp_path: Path) -> None:
    """fp16: with a scale of 2^24 gradients are infinite: no weight moves, until the scale fits."""
    engine = build("float16", stage, deepspeed_config=scaled(tmp_path, 24))
    before = help_.weights(engine.module)
    sft_step(engine, batches(engine))
    for name, tensor in help_.weights(engine.module).items():
        assert torch.equal(tensor, before[name]), name
    assert engine.deepspeed.optimizer.loss_scale == 2**23
    losses = [stats["loss"] for stats in run(engine, 20)]
    assert losses[-1] < losses[0] - 0.1, "it learns once the scale fits"
    assert engine.deepspeed.optimizer.loss_scale < 2**23


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_stops_training(dtype: str) -> None:
    engine = build(dtype, 2)
    weight = next(engine.module.parameters())
    with pytest.raises(UserError, match=r"loss is nan.*learning rate"):
        engine.step(batches(engine), lambda _: weight.sum() * float("nan"))


@pytest.mark.parametrize(
    ("dtype", "stage"),
    [("float32", 0), ("bfloat16", 0), ("bfloat16", 2), ("bfloat16", 3), ("float16", 2)],
)
def test_a_checkpoint_brings_everything_back(dtype: str, stage: int, tmp_path: Path) -> None:
    """Weights to the bit, then the steps that would have followed."""
    extra = {"deepspeed_config": scaled(tmp_path, 8)} if dtype == "float16" else {}
    one = build(dtype, stage, **extra)
    run(one, 2)
    checkpoint.save_engine(one, tmp_path / "state")
    kept = help_.weights(one.module)
    followed = run(one, 2)
    two = build(dtype, stage, **extra)
    checkpoint.load_engine(two, tmp_path / "state")
    assert checkpoint.shape(two) == checkpoint.shape(one)
    for name, tensor in help_.weights(two.module).items():
        assert torch.equal(tensor, kept[name]), name
    for now, then in zip(run(two, 2), followed, strict=True):
        # Sums on a GPU come in any order.
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-3)
        assert now["learning_rate"] == then["learning_rate"]


def test_the_random_state_of_the_gpu_is_kept(gpu: torch.device) -> None:
    """What is drawn on the GPU after `set_random_state` is what would have been drawn."""
    state = checkpoint.random_state()
    wanted = torch.rand(5, device=gpu)
    torch.manual_seed(1)
    torch.rand(3, device=gpu)
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(5, device=gpu), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_offload_to_ram_follows_plain_torch(
    textbook: list[tuple[float, float]], stage: int
) -> None:
    """Optimiser (and at ZeRO-3 weights) in RAM, by DeepSpeed's CPU Adam, which is compiled here."""
    engine = build("bfloat16", stage, offload="cpu")
    for stats, (wanted, _) in zip(run(engine), textbook, strict=True):
        assert stats["loss"] == pytest.approx(wanted, rel=2e-2)


def test_frozen_engines_score_on_the_gpu(gpu: torch.device) -> None:
    """Log-probs of a frozen bf16 engine are fp32's on the CPU, within rounding."""
    exact = FrozenEngine(help_.load_policy(), EngineConfig(), dtype="float32")
    rounded = FrozenEngine(help_.load_policy(dtype="bfloat16"), EngineConfig(), dtype="bfloat16")
    (batch,) = batches(exact, 8)
    plain = help_.load_policy()
    cpu = batch.to("cpu")
    wanted, _ = plain(cpu.input_ids, cpu.attention_mask, cpu.attention_mask)
    for engine, allowed in ((exact, 1e-4), (rounded, 0.1)):
        found, _ = engine(batch.input_ids, batch.attention_mask, batch.attention_mask)
        assert found.device.type == gpu.type
        torch.testing.assert_close(found.cpu(), wanted.detach(), atol=allowed, rtol=0)


def test_peak_memory_is_the_gpus(only_gpu: torch.device) -> None:
    """A tensor of 256 MiB shows in the peak since the last look, and is gone after it."""
    peak_since_last()
    before, free = peak_since_last(), available_memory()
    block = torch.zeros(64 * 2**20, device=only_gpu)
    assert peak_since_last() == pytest.approx(before + 2**28, abs=2**20)
    assert available_memory() == pytest.approx(free - 2**28, abs=2**26)
    del block
    peak_since_last()
    assert peak_since_last() == pytest.approx(before, abs=2**20)
    assert peak_memory() >= before + 2**28 - 2**20
