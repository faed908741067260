"""Decode steps with fixed shapes (rlhf/rollout/graphs.py), run anew here; on a GPU: tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.rollout import SamplingConfig

import rlhf.rollout.continuous as continuous
from rlhf.rollout import ContinuousRollout
from rlhf.rollout.forward import forward_of
from rlhf.rollout.graphs import GraphForward
from rlhf.rollout.lean import LeanForward
from tests.unit.rollout_support import (
    PAD,
    engine_of,
    fresh_log_probs,
    hf_greedy,
    prompts,
    spread_eos,
    tiny_model,
)

LENGTHS = (9, 3, 12, 1, 7, 12, 2, 5, 4, 8, 11, 6, 2, 10)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[GraphForward]:
    """The continuous engine decodes with fixed shapes; the forwards that it has used."""
    made: list[GraphForward] = []

    @contextmanager
    def fixed(model: Any, **_: Any) -> Iterator[GraphForward]:
        lean = LeanForward.of(model)
        assert lean is not None
        made.append(GraphForward(lean, capture=False))
        yield made[-1]

    monkeypatch.setattr(continuous, "forward_of", fixed)
    return made


def build(model: Any, eos: int, batch_size: int) -> ContinuousRollout:
    ids = SimpleNamespace(pad_token_id=PAD, eos_token_id=eos)
    return ContinuousRollout(engine_of(model), ids, batch_size=batch_size)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3"])
@pytest.mark.parametrize("batch_size", [1, 5, 14])
def test_greedy_equals_generate(used: list[GraphForward], family: str, batch_size: int) -> None:
    """Rows join, end and move, the cache moves, steps take in spare rows: the same tokens."""
    model, request, limit = tiny_model(family), prompts(*LENGTHS), 60
    eos = spread_eos(hf_greedy(model, request, limit, None))
    expected = hf_greedy(model, request, limit, eos)
    sampling = SamplingConfig(max_new_tokens=limit, temperature=0.0)
    out = build(model, eos, batch_size).generate(request, sampling)
    assert len(used) == 1
    assert torch.equal(out.answers, expected[:, : out.answers.shape[1]])


def test_log_probs_are_a_fresh_forwards(used: list[GraphForward]) -> None:
    model = tiny_model("llama")
    out = build(model, 5, 6).generate(prompts(*LENGTHS), SamplingConfig(max_new_tokens=50))
    fresh = fresh_log_probs(model, out, 1.0)
    assert len(set(out.answer_mask.sum(1).tolist())) > 3, "ends must be mixed"
    apart = (out.log_probs - fresh)[out.answer_mask].abs()
    assert float(apart.max()) < 1e-4


def test_one_recording_serves_until_a_quarter_is_left(
    used: list[GraphForward], monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 rows: recorded for 16, for 4 when 4 are alive, for 1 when one is; and after each move."""
    rows: list[tuple[int, int]] = []
    record = GraphForward._record

    def counted(self: GraphForward, tokens: torch.Tensor, *others: Any) -> Any:
        step = record(self, tokens, *others)
        rows.append((len(tokens), step.rows))
        return step

    monkeypatch.setattr(GraphForward, "_record", counted)
    model, request = tiny_model("llama"), prompts(*LENGTHS, 3, 3)
    eos = spread_eos(hf_greedy(model, request, 30, None))
    sampling = SamplingConfig(max_new_tokens=30, temperature=0.0)
    build(model, eos, 16).generate(request, sampling)
    for alive, taken in rows:
        assert taken in (16, 4, 1)
        assert taken >= alive > taken // 4
    assert len(rows) < 8, "not for every step"
    assert {taken for _, taken in rows} >= {16, 4}


def test_a_cpu_has_no_graphs() -> None:
    with forward_of(tiny_model("llama"), lean=True, whole=True) as forward:
        assert isinstance(forward, LeanForward)
