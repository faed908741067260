"""The work that the roofline counts, against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import ANSWER, PROMPT, linear_work, rollout_work, score_work
from tests.unit.rollout_support import VOCAB, tiny_model


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_work_of_a_forward(family):
    """A forward of two rows of 24 tokens: linear layers per token, and the head."""
    model = tiny_model(family)
    body, head = linear_work(model)
    assert head == 2 * VOCAB * 32
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=torch.randint(2, VOCAB, (2, 24)))
    products = sum(
        flops
        for op, flops in counted.get_flop_counts()["Global"].items()
        if "addmm" in str(op) or str(op).endswith(".mm")
    )
    assert products == 48 * (body + head)


def test_phases_by_hand():
    """llama: 4 heads of 8, 2 layers. One row: attention of n tokens has n (n + 1) / 2 pairs."""
    model = tiny_model("llama")
    body, head = linear_work(model)
    length = PROMPT + ANSWER
    pairs = length * (length + 1) / 2
    assert score_work(model, 1) == length * body + ANSWER * head + 4 * pairs * 32 * 2
    # A rollout reads one token less, and its attention is that of length - 1.
    assert score_work(model, 3) - rollout_work(model, 3) == 3 * (body + 4 * length * 32 * 2)
