"""How a batch is split must not change its gradient (ALGORITHM 30)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlhf.algo.logprobs import log_probs_from_hidden
from rlhf.algo.losses import cross_entropy_sum, kl_loss, policy_loss, value_loss
from rlhf.algo.masking import masked_sum, states_before_answer

ROWS, PROMPT, ANSWER, VOCAB, WIDTH = 8, 3, 6, 29, 12


class Toy(nn.Module):
    """A causal model without a transformer: the state is the running mean of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.value_head = nn.Linear(WIDTH, 1)

    def hidden(self, ids: Tensor) -> Tensor:
        steps = torch.arange(1, ids.shape[1] + 1).unsqueeze(-1)
        return torch.tanh(self.mix(self.embed(ids).cumsum(1) / steps))


class Batch:
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Toy()
        self.ids = torch.randint(0, VOCAB, (ROWS, PROMPT + ANSWER))
        self.mask = torch.arange(ANSWER) < torch.randint(0, ANSWER + 1, (ROWS, 1))
        self.mask[0, :2] = True
        self.advantages, self.returns, self.old_values = torch.randn(3, ROWS, ANSWER).unbind()
        self.old = -3 - 0.3 * torch.rand(ROWS, ANSWER)
        self.reference = self.old + 0.1 * torch.randn(ROWS, ANSWER)

    def loss_sum(self, rows: Tensor, chunk: int) -> Tensor:
        """The whole update's loss on some rows, cut to their longest answer as a collator does."""
        width = int(self.mask[rows].sum(1).max()) if len(rows) else 0

        def part(x: Tensor) -> Tensor:
            return x[rows, :width]

        ids, mask = self.ids[rows, : PROMPT + width], part(self.mask)
        states = states_before_answer(self.model.hidden(ids), PROMPT)
        log_probs, entropy = log_probs_from_hidden(
            states, self.model.lm_head, ids[:, PROMPT:], 0.8, chunk, with_entropy=True, mask=mask
        )
        assert entropy is not None
        values = self.model.value_head(states).squeeze(-1)
        return (
            policy_loss(log_probs, part(self.old), part(self.advantages), mask, 0.2)[0]
            + 0.1 * value_loss(values, part(self.old_values), part(self.returns), mask, 0.2)[0]
            + 0.05 * kl_loss(log_probs, part(self.reference), mask)[0]
            + 0.5 * cross_entropy_sum(log_probs, mask)[0]
            - 0.01 * masked_sum(entropy, mask)
        )

    def gradient(self, micro_batches: list[Tensor], chunk: int, by_count: bool = True) -> Tensor:
        self.model.zero_grad()
        for rows in micro_batches:
            tokens = self.mask.sum() if by_count else self.mask[rows].sum().clamp(min=1)
            share = 1 if by_count else 1 / len(micro_batches)
            (self.loss_sum(rows, chunk) / tokens * share).backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 500), cuts=st.sets(st.integers(0, ROWS)), chunk=st.integers(1, 50))
def test_micro_batches_and_chunks_change_nothing(seed: int, cuts: set[int], chunk: int) -> None:
    """ALGORITHM 30: any split (empty parts, other widths, any order) has the whole's gradient."""
    batch = Batch(seed)
    whole = batch.gradient([torch.arange(ROWS)], chunk=10_000)
    order = torch.randperm(ROWS)
    edges = [0, 0, *sorted(cuts), ROWS]
    parts = [order[a:b] for a, b in pairwise(edges)]
    torch.testing.assert_close(batch.gradient(parts, chunk), whole, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_mean_per_micro_batch_would_differ(size: int) -> None:
    """The control: dividing by each micro-batch's own count gives another gradient."""
    batch = Batch(0)
    parts = list(torch.arange(ROWS).split(size))
    whole = batch.gradient([torch.arange(ROWS)], chunk=7)
    assert torch.allclose(batch.gradient(parts, 7), whole, atol=2e-6, rtol=2e-5)
    assert not torch.allclose(batch.gradient(parts, 7, by_count=False), whole, atol=1e-3)


def test_first_minibatch_ratio_is_one() -> None:
    """ALGORITHM 20: old log-probs scored without grad, all rows at once; new ones with grad, in
    micro-batches and other chunks: ratio 1 and approx_kl 0 to float tolerance."""
    batch = Batch(3)
    targets = batch.ids[:, PROMPT:]
    with torch.no_grad():
        states = states_before_answer(batch.model.hidden(batch.ids), PROMPT)
        old, _ = log_probs_from_hidden(states, batch.model.lm_head, targets, 0.7, 512)
    for rows in torch.arange(ROWS).split(3):
        states = states_before_answer(batch.model.hidden(batch.ids[rows]), PROMPT)
        mask = batch.mask[rows]
        new, _ = log_probs_from_hidden(
            states, batch.model.lm_head, targets[rows], 0.7, 4, mask=mask
        )
        _, stats = policy_loss(new, old[rows], batch.advantages[rows], mask, 0.2)
        tokens = stats["tokens"].item()
        assert stats["ratio"].item() == pytest.approx(tokens, abs=1e-5)
        assert stats["ratio_max"].item() == pytest.approx(1.0 if tokens else 0.0, abs=1e-5)
        assert abs(stats["approx_kl"].item()) < 1e-6
        assert stats["clipped"].item() == 0
