"""Log-probabilities: chunked and checkpointed equal plain ones, and no full logits ever exist."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.algo.logprobs import head_loss, log_probs_from_hidden, log_probs_from_logits

ROWS, WIDTH, VOCAB = 40, 8, 97


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(4, 10, WIDTH, dtype=dtype, requires_grad=True)
    head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=dtype)
    return hidden, head, torch.randint(0, VOCAB, (4, 10))


def plain(hidden: Tensor, head: nn.Module, targets: Tensor, temperature: float = 1.0) -> Tensor:
    logits = head(hidden).float() / temperature
    return torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def test_hand_computed() -> None:
    """ALGORITHM 15: logits (ln 1, ln 2, ln 5) give 1/8, 2/8, 5/8; at T = 0.5, 1/30, 4/30, 25/30."""
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log().expand(3, 3)
    targets = torch.tensor([0, 1, 2])
    log_probs, entropy = log_probs_from_logits(logits, targets, with_entropy=True)
    assert log_probs.exp().tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=1e-6)
    by_hand = -(1 / 8 * math.log(1 / 8) + 1 / 4 * math.log(1 / 4) + 5 / 8 * math.log(5 / 8))
    assert entropy is not None
    assert entropy.tolist() == pytest.approx([by_hand] * 3, rel=1e-6)
    cold, _ = log_probs_from_logits(logits, targets, temperature=0.5)
    assert cold.exp().tolist() == pytest.approx([1 / 30, 4 / 30, 25 / 30], rel=1e-6)


def test_float32_whatever_comes_in() -> None:
    """ALGORITHM 33: bfloat16 logits are widened before the softmax, not after."""
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1)).bfloat16() * 10
    targets = torch.arange(5)
    log_probs, entropy = log_probs_from_logits(logits, targets, 0.7, with_entropy=True)
    exact = torch.log_softmax(logits.double() / 0.7, -1)
    assert log_probs.dtype == torch.float32
    assert entropy is not None
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), exact[range(5), targets], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        entropy.double(), -(exact.exp() * exact).sum(-1), atol=1e-5, rtol=1e-5
    )


def test_impossible_tokens_leave_entropy_and_gradient_finite() -> None:
    """A -inf logit (padded vocabulary) is probability 0; the entropy of two equal ones is ln 2."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    log_probs, entropy = log_probs_from_logits(logits, torch.tensor([1]), with_entropy=True)
    assert entropy is not None
    assert entropy.item() == pytest.approx(math.log(2))
    (log_probs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [pytest.approx([-0.5, 0.5, 0.0])]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 30),
    chunk=st.integers(1, 35),
    temperature=st.floats(0.3, 3.0),
    seed=st.integers(0, 1000),
    min_calls=st.integers(1, 40),
)
def test_chunks_change_nothing(
    rows: int, chunk: int, temperature: float, seed: int, min_calls: int
) -> None:
    """ALGORITHM 15, 33: values and gradients equal the unchunked ones, mask or not."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    targets = torch.randint(0, VOCAB, (rows,), generator=generator)
    mask = torch.rand(rows, generator=generator) < 0.6
    scale = torch.randn(rows, generator=generator)
    gradients = []
    for chunked in (True, False):
        head = nn.Linear(WIDTH, VOCAB, bias=False)
        head.weight.data.copy_(weight)
        states = hidden.clone().requires_grad_()
        if chunked:
            log_probs, entropy = log_probs_from_hidden(
                states, head, targets, temperature, chunk, True, mask, min_calls=min_calls
            )
        else:
            log_softmax = torch.log_softmax(head(states) / temperature, -1)
            log_probs = log_softmax[range(rows), targets] * mask
            entropy = -(log_softmax.exp() * log_softmax).sum(-1) * mask
        assert entropy is not None
        (scale * (log_probs + entropy)).sum().backward()
        assert states.grad is not None
        assert head.weight.grad is not None
        gradients.append((log_probs.detach(), entropy.detach(), states.grad, head.weight.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def test_masked_targets_are_never_looked_up() -> None:
    """ALGORITHM 3: -100 labels are fine where the mask is False; the result there is 0."""
    hidden, head, targets = problem()
    mask = torch.zeros_like(targets, dtype=torch.bool)
    mask[1, 3:7] = True
    labels = torch.where(mask, targets, -100)
    log_probs, entropy = log_probs_from_hidden(hidden, head, labels, chunk=3, mask=mask)
    assert entropy is None
    assert log_probs.shape == (4, 10)
    assert log_probs[~mask].eq(0).all()
    torch.testing.assert_close(log_probs[mask], plain(hidden, head, targets)[mask])


def test_no_counted_token() -> None:
    """An empty mask gives zeros, a graph, zero gradients, and one head call (or min_calls)."""
    hidden, head, targets = problem()
    calls: list[int] = []

    def counting(x: Tensor) -> Tensor:
        calls.append(len(x))
        return head(x)

    mask = torch.zeros_like(targets, dtype=torch.bool)
    log_probs, entropy = log_probs_from_hidden(
        hidden, counting, targets, chunk=16, mask=mask, with_entropy=True
    )
    assert calls == [0]
    assert entropy is not None
    (log_probs.sum() + entropy.sum()).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.eq(0).all()
    assert log_probs.eq(0).all()


def test_number_of_head_calls() -> None:
    """Only counted rows are worked on; ZeRO-3 ranks, which must gather the head equally often,
    agree by min_calls, also where a rank has no rows."""
    hidden, head, targets = problem()
    calls: list[int] = []

    def counting(x: Tensor) -> Tensor:
        calls.append(len(x))
        return head(x)

    with torch.no_grad():
        log_probs_from_hidden(hidden, counting, targets, chunk=16, min_calls=5)
        assert calls == [8] * 5
        calls.clear()
        mask = torch.zeros_like(targets, dtype=torch.bool)
        mask[2, 1:10] = True
        log_probs_from_hidden(hidden, counting, targets, chunk=4, mask=mask)
        assert calls == [3, 3, 3], "9 counted rows of 40, at most 4 at a time"
        calls.clear()
        empty, _ = log_probs_from_hidden(hidden[:0], counting, targets[:0], min_calls=5)
    assert calls == [0] * 5
    assert empty.shape == (0, 10)


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor whose last dimension is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == VOCAB:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_full_logits_never_exist() -> None:
    """No operation, forward or backward, makes more than chunk x vocab; nothing of it is kept."""
    hidden, head, targets = problem()
    alive: list[weakref.ref[Tensor]] = []
    most_alive = 0

    def watched(x: Tensor) -> Tensor:
        nonlocal most_alive
        most_alive = max(most_alive, sum(logits() is not None for logits in alive))
        logits = head(x)
        alive.append(weakref.ref(logits))
        return logits

    chunk = WIDTH  # the weight's own transpose has WIDTH x VOCAB elements
    with Largest() as largest:
        log_probs, entropy = log_probs_from_hidden(
            hidden, watched, targets, chunk=chunk, with_entropy=True
        )
        assert len(alive) == ROWS // chunk
        assert all(logits() is None for logits in alive)
        assert entropy is not None
        (log_probs + entropy).sum().backward()
    assert len(alive) == 2 * ROWS // chunk  # made again in the backward pass
    assert most_alive == 0
    assert 0 < largest.elements <= chunk * VOCAB
    with Largest() as control:
        plain(hidden, head, targets).sum().backward()
    assert control.elements == ROWS * VOCAB


def test_no_grad_calls_the_head_once_per_chunk() -> None:
    """Scoring does not pay for checkpoints."""
    hidden, head, targets = problem()
    with torch.no_grad():
        log_probs, _ = log_probs_from_hidden(hidden, head, targets, chunk=7)
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs, plain(hidden, head, targets).detach())


def test_head_hooks_fire_once_per_backward() -> None:
    """ZeRO reduces a weight when its gradient hook fires: once, with all chunks' gradients."""
    hidden, head, targets = problem()
    fired: list[Tensor] = []
    head.weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.clone()))
    log_probs, _ = log_probs_from_hidden(hidden.detach(), head, targets, chunk=7)
    log_probs.sum().backward()
    assert len(fired) == 1
    expected = torch.autograd.grad(plain(hidden, head, targets).sum(), head.weight)[0]
    torch.testing.assert_close(fired[0], expected, atol=1e-5, rtol=1e-5)


def test_logit_transform_comes_before_the_temperature() -> None:
    """ALGORITHM 15: softmax(cap(logits) / T), cap in float32."""
    hidden, head, targets = problem(torch.bfloat16)

    def cap(x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return 2.0 * torch.tanh(x / 2.0)

    log_probs, _ = log_probs_from_hidden(hidden, head, targets, 0.5, logit_transform=cap, chunk=9)
    exact = torch.log_softmax(2 * torch.tanh(head(hidden).double() / 2) / 0.5, -1)
    expected = exact.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 30),
    chunk=st.integers(1, 35),
    temperature=st.sampled_from([1.0, 0.6, 2.5]),
    seed=st.integers(0, 1000),
    bonus=st.sampled_from([0.0, 0.3]),
    frozen=st.booleans(),
)
def test_head_loss_equals_autograd(
    rows: int, chunk: int, temperature: float, seed: int, bonus: float, frozen: bool
) -> None:
    """15, 28, 33: a clipped-ratio loss with entropy: its value and gradients equal plain torch's
    over all logits at once, whatever the chunks, and scaled by what comes from above."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(rows, WIDTH, generator=g), torch.randn(VOCAB, WIDTH, generator=g)
    targets = torch.randint(0, VOCAB, (rows,), generator=g)
    advantages, old = torch.randn(rows, generator=g), torch.randn(rows, generator=g) - 4
    bias = torch.randn(VOCAB, generator=g) if seed % 2 else None

    def token_loss(log_probs: Tensor, entropy: Tensor | None, where: slice) -> Tensor:
        assert entropy is not None
        gain, ratio = advantages[where], (log_probs - old[where]).exp()
        return torch.maximum(-gain * ratio, -gain * ratio.clamp(0.8, 1.2)).sum() - (
            bonus * entropy.sum()
        )

    found = []
    for fused in (True, False):
        states = hidden.clone().requires_grad_()
        head = weight.clone().requires_grad_(not frozen)
        if fused:
            loss = head_loss(states, head, bias, targets, token_loss, temperature, chunk, True)
        else:
            logits = torch.nn.functional.linear(states, head, bias) / temperature
            log_softmax = torch.log_softmax(logits, -1)
            entropy = -(log_softmax.exp() * log_softmax).sum(-1)
            loss = token_loss(log_softmax[range(rows), targets], entropy, slice(0, rows))
        (loss / 7).backward()
        assert (head.grad is None) == frozen
        found.append((loss.detach(), states.grad, torch.zeros(1) if frozen else head.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


def test_head_loss_holds_one_chunk() -> None:
    """Nothing of the vocabulary's width outlives its chunk, forward or backward; the head is
    multiplied once forward and twice for the gradients."""
    hidden, head, targets = problem()
    rows, ids = hidden.flatten(0, 1), targets.flatten()
    with Largest() as largest:
        loss = head_loss(
            rows, head.weight, None, ids, lambda log_probs, *_: -log_probs.sum(), chunk=WIDTH
        )
        loss.backward()
    assert 0 < largest.elements <= WIDTH * VOCAB
    assert head.weight.grad is not None
    assert largest.products == 3 * ROWS // WIDTH


def test_head_loss_in_bf16() -> None:
    """33: the weight's gradient is summed over chunks in fp32, so many chunks cost no precision."""
    torch.manual_seed(0)
    hidden = torch.randn(512, WIDTH, dtype=torch.bfloat16)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.bfloat16)
    targets = torch.randint(0, VOCAB, (512,))
    exact = weight.double().requires_grad_()
    torch.nn.functional.cross_entropy(
        hidden.double() @ exact.t(), targets, reduction="sum"
    ).backward()
    assert exact.grad is not None
    errors = []
    for chunk in (512, 4):
        head = weight.clone().requires_grad_()
        head_loss(hidden, head, None, targets, lambda lp, *_: -lp.sum(), chunk=chunk).backward()
        assert head.grad is not None
        assert head.grad.dtype == torch.bfloat16
        errors.append(float((head.grad.double() - exact.grad).norm() / exact.grad.norm()))
    assert errors[1] < 0.01
    assert errors[1] < 1.5 * errors[0] + 1e-3


def test_head_loss_without_rows_or_with_impossible_tokens() -> None:
    """A rank without counted tokens has zero gradients; a -inf bias is probability 0."""
    hidden, head, targets = problem()
    rows, ids = hidden.flatten(0, 1), targets.flatten()
    head_loss(rows[:0], head.weight, None, ids[:0], lambda lp, *_: lp.sum()).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.eq(0).all()
    bias = torch.zeros(VOCAB)
    bias[5] = -torch.inf
    entropies: list[Tensor] = []

    def token_loss(log_probs: Tensor, entropy: Tensor | None, where: slice) -> Tensor:
        assert entropy is not None
        entropies.append(entropy.detach())
        return (log_probs + entropy).sum()

    head.weight.grad = None
    ids = torch.where(ids == 5, 6, ids)
    head_loss(rows, head.weight, bias, ids, token_loss, with_entropy=True).backward()
    assert torch.cat(entropies).isfinite().all()
    assert head.weight.grad is not None
    assert head.weight.grad.isfinite().all()
    with pytest.raises(ValueError, match="bias is trained"):
        head_loss(rows, head.weight, bias.zero_().requires_grad_(), ids, token_loss)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": torch.zeros(4, 9, dtype=torch.long)}, "does not fit targets"),
        ({"mask": torch.ones(4, 9, dtype=torch.bool)}, "not shaped like"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"chunk": 0}, "chunk 0"),
        ({"min_calls": 0}, "min_calls 0"),
    ],
)
def test_refusals(change: dict, words: str) -> None:
    """Arguments that do not fit are named."""
    hidden, head, targets = problem()
    with pytest.raises(ValueError, match=words):
        log_probs_from_hidden(**{"hidden": hidden, "lm_head": head, "targets": targets, **change})
