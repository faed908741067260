"""Losses against numbers worked out by hand, and what must hold for any batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algo.losses import (
    cross_entropy_sum,
    kl_loss,
    pairwise_loss,
    policy_loss,
    token_wise_pairwise_loss,
    value_loss,
)

ON = torch.ones(1, 4, dtype=torch.bool)


def test_policy_loss_by_hand() -> None:
    """ALGORITHM 28: the four cases of gain and ratio outside the clip range."""
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5]])
    advantages = torch.tensor([[2.0, 2.0, -2.0, -2.0]])
    loss, stats = policy_loss(ratio.log(), torch.zeros(1, 4), advantages, ON, clip=0.2)
    # gain: min(3, 2.4) = 2.4 and min(1, 1.6) = 1; loss of the others: max(3, 2.4), max(1, 1.6)
    assert loss.item() == pytest.approx(-2.4 - 1.0 + 3.0 + 1.6)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {
            "tokens": 4,
            "ratio": 4.0,
            "ratio_max": 1.5,
            "clipped": 2,
            "approx_kl": 4 - 4 - 2 * math.log(1.5) - 2 * math.log(0.5),
        },
        rel=1e-5,
    )


def test_policy_gradient_by_hand() -> None:
    """ALGORITHM 28: -A ratio inside the range, 0 where the clip is active."""
    log_probs = torch.tensor([[1.1, 1.5, 0.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[2.0, 2.0, 2.0, -2.0]])
    policy_loss(log_probs, torch.zeros(1, 4), advantages, ON, clip=0.2)[0].backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [pytest.approx([-2.2, 0.0, -1.0, 0.0])]


def test_policy_first_minibatch() -> None:
    """ALGORITHM 20: with the rollout's own log-probs ratio is 1, approx_kl 0, nothing clipped."""
    log_probs = -torch.rand(3, 5)
    mask = torch.rand(3, 5) < 0.7
    loss, stats = policy_loss(log_probs, log_probs, torch.ones(3, 5), mask, clip=0.2)
    assert stats["ratio"].item() == stats["tokens"].item() == mask.sum().item()
    assert stats["ratio_max"].item() == 1
    assert stats["approx_kl"].item() == stats["clipped"].item() == 0
    assert loss.item() == pytest.approx(-mask.sum().item())


def test_policy_log_ratio_is_clamped() -> None:
    """ALGORITHM 28: +-20 before exp; a log-ratio of 500 stays finite, with its gradient."""
    log_probs = torch.tensor([[500.0, -500.0, 0.0, 0.0]], requires_grad=True)
    loss, stats = policy_loss(log_probs, torch.zeros(1, 4), -torch.ones(1, 4), ON, clip=0.2)
    assert loss.item() == pytest.approx(math.exp(20) + 0.8 + 2, rel=1e-6)
    assert stats["ratio_max"].item() == pytest.approx(math.exp(20), rel=1e-6)
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


def test_policy_importance_weights() -> None:
    """Each token's loss times its weight; the weight has no gradient."""
    weight = torch.tensor([[2.0, 0.5, 0.0, 1.0]], requires_grad=True)
    log_probs = torch.zeros(1, 4, requires_grad=True)
    loss, _ = policy_loss(log_probs, torch.zeros(1, 4), torch.ones(1, 4), ON, 0.2, weight)
    assert loss.item() == -3.5
    loss.backward()
    assert weight.grad is None
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[-2.0, -0.5, 0.0, -1.0]]


def test_value_loss_by_hand() -> None:
    """ALGORITHM 29: 0.5 max((v - R)^2, (clip(v, v_old +- 0.2) - R)^2)."""
    values = torch.tensor([[1.0, 1.0, 0.1, 3.0]], requires_grad=True)
    old = torch.tensor([[0.0, 0.0, 0.0, 3.0]])
    returns = torch.tensor([[1.0, 0.0, 1.0, 5.0]])
    loss, stats = value_loss(values, old, returns, ON, clip=0.2)
    # clipped values .2 .2 .1 3: squares max(0, .64), max(1, .04), .81, 4
    assert loss.item() == pytest.approx(0.5 * (0.64 + 1.0 + 0.81 + 4.0))
    assert stats["value_clipped"].item() == 1
    assert stats["value"].item() == pytest.approx(5.1)
    loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [pytest.approx([0.0, 1.0, -0.9, -2.0])]
    plain, _ = value_loss(values, old, returns, ON, clip=None)
    assert plain.item() == pytest.approx(0.5 * (0 + 1 + 0.81 + 4))


def test_kl_loss_by_hand() -> None:
    """ALGORITHM 22, 37: k3 = q/p - 1 - ln(q/p), gradient 1 - q/p; k1 is refused as a loss."""
    log_probs = torch.tensor([[0.5, 0.25]]).log().requires_grad_()
    reference = torch.tensor([[0.25, 0.5]]).log()
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, stats = kl_loss(log_probs, reference, mask, "k3")
    assert loss.item() == pytest.approx(0.5 - 1 + math.log(2) + 2 - 1 - math.log(2))
    assert stats["tokens"].item() == 2
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [pytest.approx([0.5, -1.0])]
    assert kl_loss(log_probs, reference, mask, "k2")[0].item() == pytest.approx(math.log(2) ** 2)
    with pytest.raises(ValueError, match="'k1' as a loss"):
        kl_loss(log_probs, reference, mask, "k1")


def test_cross_entropy_sum() -> None:
    """ALGORITHM 3, 36: minus the sum of counted log-probs."""
    loss, stats = cross_entropy_sum(
        torch.tensor([[-1.0, -2.0, torch.nan]]), torch.tensor([[True, True, False]])
    )
    assert (loss.item(), stats["tokens"].item()) == (3.0, 2.0)


def test_pairwise_loss_by_hand() -> None:
    """ALGORITHM 7: -logsigmoid(r_chosen - r_rejected - margin), margin 0 by default."""
    chosen = torch.tensor([1.0, 0.0, 2.0], requires_grad=True)
    rejected = torch.tensor([0.0, 0.0, 3.0])
    loss, stats = pairwise_loss(chosen, rejected)
    expected = [math.log1p(math.exp(-d)) for d in (1.0, 0.0, -1.0)]
    assert loss.item() == pytest.approx(sum(expected))
    assert {k: v.item() for k, v in stats.items()} == {"pairs": 3, "correct": 1, "margin": 0}
    loss.backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(d)) for d in (1.0, 0.0, -1.0)])
    wide, _ = pairwise_loss(chosen, rejected, torch.tensor([1.0, 0.0, -1.0]))
    assert wide.item() == pytest.approx(3 * math.log(2))
    some, stats = pairwise_loss(
        chosen, torch.tensor([0.0, torch.nan, 3.0]), mask=torch.tensor([True, False, True])
    )
    assert some.item() == pytest.approx(expected[0] + expected[2])
    assert stats["pairs"].item() == 2
    assert pairwise_loss(torch.tensor([-2e3]), torch.tensor([2e3]))[0].item() == 4e3


def token_wise(
    chosen: list[int], rejected: list[int], v_c: list[float], v_r: list[float], **kwargs: float
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """One pair of id lists, right-padded by two columns with id 0, values there 1e6."""
    width = max(len(chosen), len(rejected)) + 2

    def padded(x: list, fill: float) -> Tensor:
        return torch.tensor([x + [fill] * (width - len(x))])

    values = padded(v_c, 1e6).float().requires_grad_()
    loss, stats = token_wise_pairwise_loss(
        values,
        padded(v_r, 1e6).float(),
        padded(chosen, 0).long(),
        padded(rejected, 0).long(),
        padded([1] * len(chosen), 0).bool(),
        padded([1] * len(rejected), 0).bool(),
        **kwargs,
    )
    loss.backward()
    assert values.grad is not None
    return loss.detach(), stats, values.grad


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_token_wise_by_hand() -> None:
    """ALGORITHM 7: mean from the first difference; the ended side stands by its last value."""
    loss, stats, gradient = token_wise(
        [5, 6, 7, 2], [5, 6, 8, 9, 3, 2], [9.0, 9.0, 1.0, 2.0], [9.0, 9.0, 0.5, 1.0, 0.0, 3.0]
    )
    # columns 2..5: chosen 1, 2, 2, 2 against rejected .5, 1, 0, 3; pads (1e6) never enter
    differences = [0.5, 1.0, 2.0, -1.0]
    assert loss.item() == pytest.approx(sum(softplus(-d) for d in differences) / 4)
    assert {k: v.item() for k, v in stats.items()} == {"pairs": 1, "correct": 0, "margin": -1}
    slopes = [-1 / (1 + math.exp(d)) / 4 for d in differences]
    by_hand = [0, 0, slopes[0], sum(slopes[1:]), 0, 0, 0, 0]
    assert gradient.tolist() == [pytest.approx(by_hand)]


def test_token_wise_prefix_identical_and_margin() -> None:
    """ALGORITHM 7: one answer a prefix of the other; no difference at all; a margin."""
    loss, stats, _ = token_wise([5, 6], [5, 6, 7], [0.0, 1.0], [0.0, 0.0, 3.0], margin=1.0)
    assert loss.item() == pytest.approx(softplus(3.0 - 1.0 + 1.0))
    loss, stats, _ = token_wise([5, 6], [5, 6, 0], [0.0, 1.0], [0.0, 0.0, 3.0])  # 0 is the pad id
    assert loss.item() == pytest.approx(softplus(3.0 - 1.0))
    loss, stats, gradient = token_wise([5, 6], [5, 6], [0.0, 1.0], [0.0, 0.0])
    assert (loss.item(), stats["pairs"].item(), stats["correct"].item()) == (0, 0, 0)
    assert gradient.eq(0).all()
    loss, stats, _ = token_wise([], [], [], [])
    assert (loss.item(), stats["pairs"].item()) == (0, 0)


def test_token_wise_left_padding_changes_nothing() -> None:
    """ALGORITHM 7, 13: pads before the prompt, or a mask on the answer alone, give the same."""
    ids = torch.tensor([[5, 6, 7, 2, 0], [5, 6, 8, 9, 2]])
    values = torch.tensor([[9.0, 9.0, 1.0, 2.0, 7.0], [9.0, 9.0, 0.5, 1.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()

    def loss_of(ids: Tensor, values: Tensor, mask: Tensor) -> float:
        sides = [x for tensor in (values, ids, mask) for x in (tensor[:1], tensor[1:])]
        return token_wise_pairwise_loss(*sides)[0].item()

    expected = loss_of(ids, values, mask)
    pad = torch.nn.functional.pad
    left = pad(ids, (3, 0))
    left[1, :3] = 4  # what stands under the mask does not matter
    assert loss_of(left, pad(values, (3, 0)), pad(mask, (3, 0))) == expected
    answer_only = mask.clone()
    answer_only[:, :2] = False
    assert loss_of(ids, values, answer_only) == expected


def test_nothing_counted_is_zero_with_a_graph() -> None:
    """ALGORITHM 30: an empty row, mask or micro-batch gives 0 and zero gradients, never NaN."""
    for rows, width in ((2, 3), (0, 3), (2, 0)):
        x = torch.full((rows, width), torch.nan, requires_grad=True)
        bad = torch.full((rows, width), torch.inf)
        off = torch.zeros(rows, width, dtype=torch.bool)
        for loss, stats in (
            policy_loss(x, bad, bad, off, 0.2, bad),
            value_loss(x, bad, bad, off, 0.2),
            kl_loss(x, bad, off),
            cross_entropy_sum(x, off),
        ):
            assert loss.item() == 0
            assert all(value.item() == 0 for value in stats.values())
            (gradient,) = torch.autograd.grad(loss, x)
            assert gradient.eq(0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), clip=st.floats(0.05, 0.5))
def test_losses_are_sums(seed: int, clip: float) -> None:
    """ALGORITHM 30: the loss of a batch is the sum of its rows' losses, statistics too."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c = torch.randn(3, 4, 6, generator=generator).unbind()
    mask = torch.rand(4, 6, generator=generator) < 0.6
    for function in (
        lambda r: policy_loss(a[r], b[r], c[r], mask[r], clip),
        lambda r: value_loss(a[r], b[r], c[r], mask[r], clip),
        lambda r: kl_loss(a[r], b[r], mask[r]),
        lambda r: cross_entropy_sum(a[r], mask[r]),
        lambda r: pairwise_loss(a[r, 0], b[r, 0], c[r, 0]),
    ):
        whole, stats = function(slice(None))
        rows = [function(slice(i, i + 1)) for i in range(4)]
        assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in rows), rel=1e-4)
        for name, value in stats.items():
            combine = max if name.endswith("_max") else sum
            parts = combine([part[name].item() for _, part in rows])
            assert value.item() == pytest.approx(parts, rel=1e-4, abs=1e-4)
            assert value.dtype == torch.float32
            assert not value.requires_grad


def test_float32_losses_from_bfloat16() -> None:
    """ALGORITHM 33: sums of bfloat16 inputs are float32; 4,097 ones add up exactly."""
    ones = torch.ones(1, 4097).bfloat16()
    mask = torch.ones(1, 4097, dtype=torch.bool)
    assert policy_loss(ones, ones, ones, mask, 0.2)[0].item() == -4097
    assert value_loss(ones * 3, ones, ones, mask, 4.0)[0].item() == 2 * 4097
    assert cross_entropy_sum(ones, mask)[0].item() == -4097
    for loss in (pairwise_loss(ones[0], ones[0])[0], kl_loss(ones, ones, mask)[0]):
        assert loss.dtype == torch.float32


def test_shapes_are_not_broadcast() -> None:
    """A tensor of another shape is named."""
    x, bad = torch.zeros(2, 3), torch.zeros(2, 1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for call, name in (
        (lambda: policy_loss(x, bad, x, mask, 0.2), "old_log_probs"),
        (lambda: policy_loss(x, x, x, mask, 0.2, bad), "importance"),
        (lambda: value_loss(x, x, bad, mask, 0.2), "returns"),
        (lambda: kl_loss(x, bad, mask), "ref_log_probs"),
        (lambda: pairwise_loss(x[:, 0], x[0]), "rejected"),
        (lambda: pairwise_loss(x[0], x[0], bad), "margin"),
    ):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            call()
