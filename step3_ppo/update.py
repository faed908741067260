"""Act 5: from a finished rollout to optimiser steps. Does not know which algorithm made it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlhf.algo.advantages import explained_variance
from rlhf.algo.losses import kl_loss, policy_loss, sum_of_nll, value_loss
from rlhf.config.ppo import PPOConfig
from rlhf.data.batches import IGNORED, SFTBatch
from rlhf.data.plan import Budget
from rlhf.engine import comm
from rlhf.engine.train import TrainEngine
from step3_ppo.experience import answer_values
from step3_ppo.rollout import Rollout


@dataclass
class Totals:
    """Sums over micro-batches, minibatches and PPO epochs of one iteration, on this rank.

    Tensors stay on their device until `over_ranks` reads them.
    """

    sums: dict[str, Any] = field(default_factory=dict)
    maxima: dict[str, Any] = field(default_factory=dict)

    def add(self, stats: dict[str, Any]) -> None:
        for name, value in stats.items():
            number = torch.as_tensor(value).detach().double()
            if name.endswith("_max"):
                before = self.maxima.get(name)
                self.maxima[name] = number if before is None else torch.maximum(before, number)
            else:
                self.sums[name] = self.sums.get(name, 0.0) + number

    def over_ranks(self) -> dict[str, float]:
        result = comm.sum_over_ranks(self.sums)
        for name, value in self.maxima.items():
            result[name] = float(comm.all_reduce(value.clone(), "max"))
        return result


@dataclass(frozen=True)
class PtxBatches:
    """SFT rows mixed into each actor step (ALGORITHM.md 36)."""

    take: Callable[[int], list[SFTBatch]]
    """This rank's micro-batches of the next so many rows over all ranks; as many on every rank."""
    coef: float


@dataclass(frozen=True)
class FirstCriticStep:
    """An optimiser step of the critic over a whole rollout, and what its forward read."""

    values: torch.Tensor  # (N, A) fp32, from before the step
    totals: Totals
    grad_norm: float


def first_critic_step(
    critic: TrainEngine,
    rollout: Rollout,
    settings: PPOConfig,
    micro_batch_size: int | Budget,
    returns_of: Callable[[Rollout], torch.Tensor],
) -> FirstCriticStep:
    """The critic's first step of an iteration, where it takes in the whole rollout.

    Its forward gives the old values, so the critic does not read the rollout once more for them.
    `returns_of` a micro-batch with values gives (n, A) returns: they depend on a row's own values
    alone.
    """
    totals, parts = Totals(), []

    def loss_of(batch: Rollout) -> torch.Tensor:
        values = answer_values(critic, batch)
        parts.append(values.detach())
        read = replace(batch, values=parts[-1])
        return _critic_loss(values, replace(read, returns=returns_of(read)), settings, totals)

    everything = torch.arange(len(rollout), device=rollout.input_ids.device)
    groups = rollout.micro_batches(everything, micro_batch_size)
    batches = [rollout.rows(index) for index in groups]
    tokens = _counted_tokens(batches)
    norm = critic.step(batches, lambda batch: loss_of(batch) / tokens)
    return FirstCriticStep(rollout.assembled(groups, parts), totals, norm)


def update(
    actor: TrainEngine,
    critic: TrainEngine | None,
    rollout: Rollout,
    settings: PPOConfig,
    *,
    temperature: float,
    micro_batch_size: int | Budget,
    seed: int,
    samples: int = 1,
    train_actor: bool = True,
    kl_loss_coef: float = 0.0,
    ptx: PtxBatches | None = None,
    after_step: Any = None,
    began: FirstCriticStep | None = None,
) -> dict[str, float]:
    """PPO epochs over minibatches of one rollout, for actor and critic.

    `began` is the critic's first step, where it has been taken already. `seed` is the same on all
    ranks: with several minibatches each is a part of all ranks' rows, `samples` to a prompt,
    whoever generated them. Every loss is divided by the number of counted tokens of the optimiser
    step over all ranks (30). `after_step()` runs
    after each actor step (EMA). Returns means over the iteration and, as `first_ratio_error` and
    `first_approx_kl`, how far the first minibatch was from ratio 1 (20).
    """
    generator = torch.Generator().manual_seed(seed)
    actor_totals, critic_totals = Totals(), Totals()
    first: dict[str, float] = {}
    norms: dict[str, float] = {}
    stopped, steps, world = not train_actor, 0, comm.world_size()
    together = settings.minibatches > 1 and world > 1
    if together:
        rollout = rollout.of_all_ranks(samples)
    if began is not None:
        critic_totals, norms["critic_grad_norm"] = began.totals, began.grad_norm
    for epoch in range(settings.epochs):
        # 31. A new permutation for each PPO epoch.
        order = torch.randperm(len(rollout), generator=generator).to(rollout.input_ids.device)
        for minibatch in order.tensor_split(settings.minibatches):
            if together:
                rows, batches = len(minibatch), rollout.dealt(minibatch, micro_batch_size)
            else:
                groups = rollout.micro_batches(minibatch, micro_batch_size)
                rows, batches = len(minibatch) * world, [rollout.rows(index) for index in groups]
            tokens = _counted_tokens(batches)
            if critic is not None and (began is None or epoch):
                norms["critic_grad_norm"] = critic_step(
                    critic, batches, tokens, settings, critic_totals
                )
            if stopped:
                continue
            totals = Totals()
            extra = [] if ptx is None else ptx.take(rows)
            weight = 0.0 if ptx is None else ptx.coef
            norms["actor_grad_norm"] = actor_step(
                actor, batches, tokens, settings, totals, temperature, kl_loss_coef, extra, weight
            )
            steps += 1
            if after_step is not None:
                after_step()
            now = totals.over_ranks()
            if not first:
                first = {
                    "first_ratio_error": abs(now["ratio"] / now["tokens"] - 1.0),
                    "first_approx_kl": now["approx_kl"] / now["tokens"],
                }
            actor_totals.add(totals.sums | totals.maxima)
            # 35. The critic goes on; the actor's remaining steps are skipped and counted.
            if settings.target_kl and now["approx_kl"] / now["tokens"] > settings.target_kl:
                stopped = True
    result = _actor_means(actor_totals) | _critic_means(critic_totals) | first | norms
    planned = settings.epochs * settings.minibatches
    result["skipped_updates"] = float(planned - steps if train_actor else 0)
    return result


def _counted_tokens(batches: Sequence[Rollout]) -> float:
    """Answer tokens of an optimiser step, over all ranks."""
    mine = sum(float(batch.answer_mask.sum()) for batch in batches)
    return max(comm.sum_over_ranks({"tokens": mine})["tokens"], 1.0)


def actor_step(
    actor: TrainEngine,
    batches: Sequence[Rollout],
    tokens: float,
    settings: PPOConfig,
    totals: Totals,
    temperature: float,
    kl_loss_coef: float,
    ptx: Sequence[SFTBatch] = (),
    ptx_coef: float = 0.0,
) -> float:
    """One optimiser step of the policy; returns the gradient norm."""

    def loss_of(batch: Any) -> torch.Tensor:
        if isinstance(batch, SFTBatch):
            return _ptx_loss(actor, batch, ptx_tokens, totals) * ptx_coef
        counted = batch.answer_mask
        flat = {
            name: batch.need(name)[counted]
            for name in ("log_probs", "advantages", *(["ref_log_probs"] if kl_loss_coef else []))
        }

        def token_loss(
            log_probs: torch.Tensor, entropy: torch.Tensor | None, where: slice
        ) -> torch.Tensor:
            assert entropy is not None
            old, advantages = flat["log_probs"][where], flat["advantages"][where]
            mask = torch.ones_like(old, dtype=torch.bool)
            loss, stats = policy_loss(log_probs, old, advantages, mask, settings.clip)
            totals.add(stats | {"policy_loss": loss, "entropy": entropy.detach().sum()})
            if settings.entropy_coef:
                loss = loss - settings.entropy_coef * entropy.sum()
            if kl_loss_coef:
                reference = flat["ref_log_probs"][where]
                penalty, _ = kl_loss(log_probs, reference, mask, settings.kl_loss)
                totals.add({"kl_loss": penalty})
                loss = loss + kl_loss_coef * penalty
            return loss

        loss, _ = actor(
            batch.input_ids, batch.attention_mask, batch.score_mask, temperature, True, token_loss
        )
        return loss / tokens

    extra = [batch.to(actor.device) for batch in ptx]
    ptx_tokens = 1.0
    if extra:
        counted = sum(float((b.labels[:, 1:] != IGNORED).sum()) for b in extra)
        ptx_tokens = max(comm.sum_over_ranks({"tokens": counted})["tokens"], 1.0)
    return actor.step([*batches, *extra], loss_of)


def _ptx_loss(actor: TrainEngine, batch: SFTBatch, tokens: float, totals: Totals) -> torch.Tensor:
    mask = batch.labels != IGNORED
    mask[:, 0] = False
    loss, _ = actor(batch.input_ids, batch.attention_mask, mask, token_loss=sum_of_nll)
    totals.add({"ptx_loss": loss, "ptx_tokens": mask.sum()})
    return loss / tokens


def critic_step(
    critic: TrainEngine,
    batches: Sequence[Rollout],
    tokens: float,
    settings: PPOConfig,
    totals: Totals,
) -> float:
    """One optimiser step of the value model; returns the gradient norm."""

    def loss_of(batch: Rollout) -> torch.Tensor:
        return _critic_loss(answer_values(critic, batch), batch, settings, totals) / tokens

    return critic.step(batches, loss_of)


def _critic_loss(
    values: torch.Tensor, batch: Rollout, settings: PPOConfig, totals: Totals
) -> torch.Tensor:
    """The sum over the micro-batch's tokens."""
    loss, stats = value_loss(
        values, batch.need("values"), batch.need("returns"), batch.answer_mask, settings.value_clip
    )
    totals.add(stats | {"value_loss": loss.detach()})
    return loss


def value_quality(rollout: Rollout) -> dict[str, float]:
    """Explained variance of the old values, over all ranks' answer tokens."""
    if rollout.values is None or rollout.returns is None:
        return {}
    explained = explained_variance(
        rollout.values, rollout.returns, rollout.answer_mask, comm.all_reduce
    )
    return {"explained_variance": float(explained)}


def _actor_means(totals: Totals) -> dict[str, float]:
    sums = totals.over_ranks()
    if not sums:
        return {}
    tokens = max(sums["tokens"], 1.0)
    means = {
        "policy_loss": sums["policy_loss"] / tokens,
        "approx_kl": sums["approx_kl"] / tokens,
        "clip_fraction": sums["clipped"] / tokens,
        "ratio_mean": sums["ratio"] / tokens,
        "ratio_max": sums["ratio_max"],
        "entropy": sums["entropy"] / tokens,
    }
    if "kl_loss" in sums:
        means["kl_loss"] = sums["kl_loss"] / tokens
    if "ptx_loss" in sums:
        means["ptx_loss"] = sums["ptx_loss"] / max(sums["ptx_tokens"], 1.0)
    return means


def _critic_means(totals: Totals) -> dict[str, float]:
    sums = totals.over_ranks()
    if not sums:
        return {}
    tokens = max(sums["tokens"], 1.0)
    return {
        "value_loss": sums["value_loss"] / tokens,
        "value_clip_fraction": sums["value_clipped"] / tokens,
    }
