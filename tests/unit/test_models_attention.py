"""Block attention: what eager attention computes, also in its gradients, and nothing quadratic."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.models import attention
from rlhf.models.attention import NAME, BlockAttention, block_attention, fast_attention
from tests.unit import model_help as help_

MODULE: Any = SimpleNamespace(is_causal=True, num_key_value_groups=1, training=True)


def inputs(dtype: torch.dtype, groups: int, length: int = 150) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [
        torch.randn(3, length, heads, 16, generator=g).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (4, groups, groups)
    ]


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention as it is written, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def padded_mask(length: int = 150) -> Tensor:
    """(3, 1, T, T) causal, row 1 padded by 70 on the left, row 2 by 9 on the right."""
    real = torch.ones(3, length, dtype=torch.bool)
    real[1, :70], real[2, -9:] = False, False
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (causal & real[:, None, None, :]) | torch.eye(length, dtype=torch.bool)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_plain_attention(
    monkeypatch: pytest.MonkeyPatch, groups: int, padded: bool, dtype: torch.dtype
) -> None:
    """13: output and all gradients, whatever the blocks, with keys shared by heads or not."""
    mask = padded_mask() if padded else None
    q, k, v = inputs(dtype, groups)
    weight = torch.randn(3, 150, 4, 16, generator=torch.Generator().manual_seed(2))
    expected = exact(q, k, v, mask, 0.2)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for block, scores, kept in (
        (64, 1 << 20, 8),
        (40, 1 << 13, 10),
        (64, 1 << 13, 10),
        (1000, 1, 0),
    ):
        monkeypatch.setattr(attention, "KEPT", kept)  # 150 is below 10 heads' sizes, not below 8
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)
        monkeypatch.setattr(attention, "BLOCK_SCORES", scores)
        found, _ = block_attention(MODULE, q, k, v, mask, scaling=0.2)
        assert found.dtype == dtype
        gradients = torch.autograd.grad((found * weight).sum(), (q, k, v))
        pairs = [(found, expected), *zip(gradients, wanted, strict=True)]
        for one, other in pairs:
            error = (one.double() - other.double()).norm() / other.double().norm()
            assert error < tolerance


def test_a_pad_that_sees_nothing_is_finite() -> None:
    q, k, v = inputs(torch.bfloat16, 4)
    mask = padded_mask() & ~torch.eye(150, dtype=torch.bool)
    found, _ = block_attention(MODULE, q, k, v, mask)
    assert found.isfinite().all()


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 2)
        return result


def test_nothing_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward hold a block of scores, never length x length."""
    monkeypatch.setattr(attention, "BLOCK_SCORES", 1)
    q, k, v = inputs(torch.bfloat16, 4, length=1024)
    with Largest() as largest:
        found, _ = block_attention(MODULE, q, k, v, None)
        found.backward(torch.ones_like(found))
    assert largest.elements <= 4 * attention.QUERY_BLOCK * 1024
    assert largest.elements < 1024 * 1024


@pytest.mark.parametrize(("length", "kept"), [(128, True), (129, False)])
def test_short_rows_keep_their_weights(length: int, kept: bool) -> None:
    """Up to 8 times the head's size (16); never more than six hidden states' bytes."""
    q, k, v = inputs(torch.bfloat16, 4, length=length)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block_attention(MODULE, q, k, v, None)
    weights = sum(t.numel() for t in saved if t.shape[-1] != 16)
    assert (weights > 0) == kept
    assert weights <= 6 * q.numel()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        before = len(saved)
        block_attention(MODULE, q, k, v, None)
    assert len(saved) == before


def test_queries_that_are_left_out_give_zero() -> None:
    """Whatever was in the memory before: torch fills it with NaN in deterministic mode."""
    q, k, v = inputs(torch.bfloat16, 4)
    whole = BlockAttention.apply(q, k, v, None, 0.25, 0)
    torch.use_deterministic_algorithms(True)
    try:
        found = BlockAttention.apply(q, k, v, None, 0.25, 70)
        grads = torch.autograd.grad(found.float().sum(), (q, k, v))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not found[:, :, :70].any()
    torch.testing.assert_close(found[:, :, 70:], whole[:, :, 70:], atol=0.02, rtol=0.02)
    assert not grads[0][:, :, :70].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_only_where_it_helps() -> None:
    """16 bits on a CPU, sdpa, no gradient checkpointing; the model's own choice comes back."""
    for dtype, settings, used in (
        ("bfloat16", {}, True),
        ("float32", {}, False),
        ("bfloat16", {"attn_implementation": "eager"}, False),
        ("bfloat16", {"gradient_checkpointing": True}, False),
    ):
        model = help_.load_policy(dtype=dtype, **settings).model.train()
        before = model.config._attn_implementation
        with fast_attention(model.base_model):
            assert (model.config._attn_implementation == NAME) == used
        assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3", "gemma2"])
def test_a_model_computes_the_same(family: str) -> None:
    """The families' hidden states in bf16 are as near to fp32 with it as without it."""
    module = help_.load_policy(family, dtype="bfloat16").eval()
    whole = help_.load_policy(family).eval()
    ids = torch.arange(3, 83).view(2, 40)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :11] = False
    with torch.no_grad():
        wanted = whole.hidden(ids, mask)[mask]
        ours = module.hidden(ids, mask)[mask]
        theirs = module.model.base_model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
        ).last_hidden_state[mask]
    error, usual = ((x.float() - wanted).norm() for x in (ours, theirs))
    assert error < 1.5 * usual
    assert error > 0
