"""Nothing as large as batch x length x vocabulary exists in any act, forward or backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.data.batches import collate_prompts
from rlhf.models import causal
from rlhf.rollout import build_rollout
from step1_sft.main import sft_step
from step3_ppo.experience import generate, score
from step3_ppo.update import PtxBatches, update
from tests.unit import model_help as help_
from tests.unit.steps_help import ppo_settings, scored_rollout
from tests.unit.test_steps_rollout import roles

VOCAB, CHUNK, ROWS = len(help_.tokenizer()), 32, 24


class Largest(TorchDispatchMode):
    """The most elements of a tensor that is as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCAB:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)
    monkeypatch.setattr(causal, "HEAD_CHUNK", CHUNK)


def test_a_ppo_iteration() -> None:
    """Rollout, scoring, and an update with entropy, KL loss and ptx: a chunk of rows at a time."""
    models_ = roles()
    rollout = scored_rollout(rows=ROWS)
    counted = int(rollout.answer_mask.sum())
    assert counted > 2 * CHUNK
    sft = help_.sft_batches(help_.sft_rows(12), 12)
    prompts = collate_prompts([{"prompt_ids": [5, 6, 7], "prompt": ""}] * ROWS, help_.PAD)
    from rlhf.config.schema import RolloutConfig

    sampler = build_rollout("continuous", models_.actor, help_.tokenizer(), batch_size=ROWS)
    with Largest() as largest:
        generate(sampler, prompts, RolloutConfig(max_new_tokens=4))
        bare = replace(rollout, log_probs=None, ref_log_probs=None, values=None)
        scored = score(models_, bare, 1.0, ROWS)
        assert 0 < largest.elements <= CHUNK * VOCAB
        filled: Any = replace(scored, advantages=rollout.advantages, returns=rollout.returns)
        update(
            models_.actor, models_.critic, filled, ppo_settings(epochs=1, entropy_coef=0.1),
            temperature=0.7, micro_batch_size=ROWS, seed=1, kl_loss_coef=0.1,
            ptx=PtxBatches(lambda _: sft, 0.5),
        )  # fmt: skip
    assert largest.elements <= CHUNK * VOCAB


def test_an_sft_step() -> None:
    """The same for the SFT loss and its gradients."""
    engine = help_.train_engine(help_.load_policy(name=help_.lively()))
    batches = help_.sft_batches(help_.sft_rows(ROWS), ROWS)
    assert int((batches[0].labels >= 0).sum()) > 2 * CHUNK
    with Largest() as largest:
        sft_step(engine, batches)
    assert 0 < largest.elements <= CHUNK * VOCAB
