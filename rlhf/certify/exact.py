"""Checks that draw nothing: gradients of the KL estimators, best-of-n, whitening over ranks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf.algo import losses, rewards
from rlhf.algo.advantages import whiten
from rlhf.algo.masking import AllReduce
from rlhf.certify.check import Check


def estimators() -> Iterator[Check]:
    """Expected gradients against KL's own, on 50 tokens far from and near the reference (22)."""
    for distance, worst_k3 in ((0.09, 0.01), (1.2, 0.2)):
        generator = torch.Generator().manual_seed(1)
        reference = torch.randn(50, generator=generator).double().log_softmax(0)
        moved = reference + distance * torch.randn(50, generator=generator)
        logits = moved.clone().requires_grad_()
        log_p = logits.log_softmax(0)
        kl = (log_p.exp() * (log_p - reference)).sum()
        (exact,) = torch.autograd.grad(kl, logits, retain_graph=True)
        where = f"at KL {float(kl.detach()):.3f}"

        def expected(per_token: Tensor, logits: Tensor = logits) -> Tensor:
            log_p = logits.log_softmax(0)
            weighted = (log_p.detach().exp() * per_token.double() * log_p).sum()
            return torch.autograd.grad(weighted, logits)[0]

        column, ref = log_p.detach().float()[:, None], reference.float()[:, None]
        found = expected(_as_reward(column, ref))
        yield Check(f"k1 in the reward, {where}: gradient", _apart(found, exact), 1e-3)
        found = expected(_as_loss(column, ref, "k2"))
        yield Check(f"k2 as a loss, {where}: gradient", _apart(found, exact), 1e-3)
        reverse = log_p.detach().exp() - reference.exp()
        found = expected(_as_loss(column, ref, "k3"))
        yield Check(f"k3 as a loss, {where}: gradient of reverse KL", _apart(found, reverse), 1e-3)
        cosine = float(torch.cosine_similarity(found, exact, dim=0))
        yield Check(f"k3 as a loss, {where}: 1 - cosine with KL's", 1 - cosine, worst_k3)


def _apart(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _as_reward(log_p: Tensor, reference: Tensor) -> Tensor:
    """d loss / d log-prob of each token, with the KL as the only reward."""
    mask = torch.ones_like(log_p, dtype=torch.bool)
    credit = rewards.token_rewards(torch.zeros(len(log_p)), log_p, reference, mask, 1.0)
    leaf = log_p.clone().requires_grad_()
    loss, _ = losses.policy_loss(leaf, log_p, credit, mask, 0.2)
    return torch.autograd.grad(loss, leaf)[0][:, 0]


def _as_loss(log_p: Tensor, reference: Tensor, kind: str) -> Tensor:
    leaf = log_p.clone().requires_grad_()
    loss, _ = losses.kl_loss(leaf, reference, torch.ones_like(leaf, dtype=torch.bool), kind)
    return torch.autograd.grad(loss, leaf)[0][:, 0]


def best_of_n(reference: Tensor, reward: Tensor, n: int) -> Tensor:
    """(K,) probabilities of the best of n answers drawn from `reference` (K,), by `reward` (K,)."""
    order = reward.argsort()
    up_to = reference[order].double().cumsum(0).clamp(max=1.0)
    below = torch.cat([up_to.new_zeros(1), up_to[:-1]])
    result = torch.empty_like(up_to)
    result[order] = up_to**n - below**n
    return result


def best_of_n_bounds() -> Iterator[Check]:
    """Win rate over the reference and KL to it, enumerated, against the bounds (42)."""
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(64, generator=generator).softmax(0).double()
    reward = torch.randn(64, generator=generator).double()
    better = (reward[:, None] > reward).double() + 0.5 * (reward[:, None] == reward).double()
    for n in (2, 4, 16):
        best = best_of_n(reference, reward, n)
        wins = float(best @ better @ reference)
        kl = float((best * (best / reference).clamp(min=1e-300).log()).sum())
        yield Check(f"best of {n}: win rate over the reference", wins, n / (n + 1) + 1e-9)
        yield Check(f"best of {n}: KL", kl, math.log(n) - (n - 1) / n + 1e-9, "nats")


def two_ranks() -> Iterator[Check]:
    """Two ranks whiten as one that holds all rows does (27)."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(8, 5, generator=generator) + torch.arange(8)[:, None]
    mask = torch.arange(5) < torch.randint(1, 6, (8, 1), generator=generator)
    whole = whiten(values, mask)

    def half(start: int) -> Callable[[AllReduce], Tensor]:
        rows = slice(start, start + 4)
        return lambda all_reduce: whiten(values[rows], mask[rows], all_reduce)

    parts = on_ranks([half(0), half(4)])
    apart = (torch.cat(parts) - whole).abs().max()
    counted = whole[mask]
    yield Check("advantages whitened on two ranks as on one", float(apart), 1e-5)
    yield Check("whitened advantages: |mean|", float(counted.mean().abs()), 1e-5)
    yield Check("whitened advantages: |std - 1|", float((counted.std(False) - 1).abs()), 1e-4)


def on_ranks(works: list[Callable[[AllReduce], Tensor]]) -> list[Tensor]:
    """Each of `works` in a thread of its own, with an all_reduce that sums over them."""
    barrier = threading.Barrier(len(works), timeout=60)
    shared: list[Tensor | None] = [None] * len(works)
    results: list[Tensor | None] = [None] * len(works)

    def run(rank: int) -> None:
        def all_reduce(tensor: Tensor) -> Tensor:
            shared[rank] = tensor
            barrier.wait()
            total = torch.stack([part for part in shared if part is not None]).sum(0)
            barrier.wait()
            return total

        try:
            results[rank] = works[rank](all_reduce)
        finally:
            if results[rank] is None:
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [torch.as_tensor(float("nan")) if part is None else part for part in results]
