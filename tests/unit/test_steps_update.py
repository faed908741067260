"""step3_ppo.update: what one optimiser step is, and which steps are taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf import data
from rlhf.algo.algorithms import ALGORITHMS
from rlhf.config.ppo import PPOConfig
from rlhf.data.plan import Budget
from step3_ppo import update as update_module
from step3_ppo.experience import answer_values, credit, policy_log_probs
from step3_ppo.rollout import Rollout
from step3_ppo.update import PtxBatches, first_critic_step, update, value_quality
from tests.unit import model_help as help_
from tests.unit.steps_help import ppo_settings, scored_rollout
from tests.unit.test_steps_rollout import roles, sample


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


def engines(critic: bool = True, lr: float = 1e-3) -> tuple[Any, Any]:
    actor = help_.train_engine(help_.load_policy(name=help_.lively()), learning_rate=lr)
    if not critic:
        return actor, None
    value = help_.load_value(name=help_.reward_dir(), new_head=False)
    return actor, help_.train_engine(value, learning_rate=lr)


def run(
    rollout: Rollout, settings: PPOConfig, *, size: int | Budget = 6, critic: bool = True,
    lr: float = 1e-3, seed: int = 1, **options: Any,
) -> tuple[dict[str, float], Any, Any]:  # fmt: skip
    actor, value = engines(critic, lr)
    stats = update(
        actor, value, rollout, settings, temperature=1.0, micro_batch_size=size, seed=seed,
        **options,
    )  # fmt: skip
    return stats, actor, value


def fresh(rollout: Rollout) -> Rollout:
    """With old log-probs and values as the models start."""
    models_ = roles()
    with models_.actor.evaluating(), models_.critic.evaluating():
        old = policy_log_probs(models_.actor, rollout, 1.0)
        values = answer_values(models_.critic, rollout)
    return replace(rollout, log_probs=old, ref_log_probs=old, values=values)


def test_the_first_minibatch_is_on_policy() -> None:
    """20: ratio 1 and approx_kl 0 in the first minibatch, from the sampler's own log-probs; not
    so in later ones."""
    models_ = roles(critic=False)
    rollout = sample(models_.actor, temperature=0.8)
    g = torch.Generator().manual_seed(0)
    advantages = torch.randn(rollout.answer_mask.shape, generator=g) * rollout.answer_mask
    rollout = replace(rollout, advantages=advantages, ref_log_probs=rollout.log_probs)
    stats = update(
        models_.actor, None, rollout, ppo_settings(epochs=3, minibatches=2), temperature=0.8,
        micro_batch_size=2, seed=5,
    )  # fmt: skip
    assert stats["first_ratio_error"] < 1e-5
    assert abs(stats["first_approx_kl"]) < 1e-6
    assert stats["approx_kl"] > 1e-5
    assert stats["ratio_max"] > 1.001
    assert stats["skipped_updates"] == 0


def test_one_step_against_autograd() -> None:
    """28, 29, 30: the actor's and the critic's gradient norms are those of the textbook losses,
    each over all counted tokens, computed here with plain torch."""
    rollout = scored_rollout()
    stats, _, _ = run(rollout, ppo_settings(epochs=1), size=2)
    policy, value = help_.load_policy(name=help_.lively()), help_.load_value(
        name=help_.reward_dir(), new_head=False
    )  # fmt: skip
    tokens = rollout.answer_mask.sum()
    old, adv = rollout.log_probs, rollout.advantages
    width = rollout.prompt_width
    logits = policy.model(
        rollout.input_ids, attention_mask=rollout.attention_mask.long(),
        position_ids=(rollout.attention_mask.long().cumsum(1) - 1).clamp(min=0),
    ).logits  # fmt: skip
    log_probs = logits[:, width - 1 : -1].log_softmax(-1)
    new = log_probs.gather(-1, rollout.input_ids[:, width:, None]).squeeze(-1)
    ratio = (new - old).exp()
    losses = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    (losses * rollout.answer_mask).sum().div(tokens).backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm()
    assert stats["actor_grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    counted = rollout.answer_mask
    assert stats["entropy"] == pytest.approx(entropy[counted].mean().item(), rel=1e-4)
    assert stats["policy_loss"] == pytest.approx(losses[counted].mean().item(), rel=1e-4)
    assert stats["ratio_mean"] == pytest.approx(ratio[counted].mean().item(), rel=1e-4)
    assert stats["ratio_max"] == pytest.approx(ratio[counted].max().item(), rel=1e-4)

    raw = value(rollout.input_ids, rollout.attention_mask)
    v = ((raw - 0.25) / 2.0)[:, width - 1 : -1]
    near = rollout.values + (v - rollout.values).clamp(-0.2, 0.2)
    squared = torch.maximum((v - rollout.returns) ** 2, (near - rollout.returns) ** 2) * 0.5
    (squared * counted).sum().div(tokens).backward()
    norm = torch.stack([p.grad.norm() for p in value.parameters() if p.grad is not None]).norm()
    assert stats["critic_grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert stats["value_loss"] == pytest.approx(squared[counted].mean().item(), rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4, Budget(6, 20), Budget(2, 40)])
def test_micro_batches_change_nothing(size: int | Budget) -> None:
    """30: the same statistics and weights for any micro-batch size, with KL loss and entropy."""
    settings = ppo_settings(epochs=2, minibatches=2, entropy_coef=0.01)
    found = [run(scored_rollout(), settings, size=s, kl_loss_coef=0.1) for s in (size, 6)]
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4, rel=1e-4)
    for engine in (1, 2):
        ours, theirs = (help_.weights(one[engine].module) for one in found)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("size", [2, 6, Budget(6, 20)])
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_critic_reads_and_steps_at_once(size: int | Budget, epochs: int) -> None:
    """25, 29, 30: where one step takes in the whole rollout, its forward gives the old values: the
    same values, figures and weights as a reading of its own and a step after it."""
    settings = ppo_settings(epochs=epochs)
    ppo, bare = ALGORITHMS["ppo"], replace(scored_rollout(), values=None, returns=None)
    filled = replace(bare, token_rewards=bare.answer_mask * 0.3)

    def returns_of(batch: Rollout) -> Any:
        return credit(batch, ppo, settings, 1, whiten=False).returns

    actor, critic = engines()
    first = first_critic_step(critic, filled, settings, size, returns_of)
    credited = credit(replace(filled, values=first.values), ppo, settings, 1)
    options: dict[str, Any] = {"temperature": 1.0, "micro_batch_size": size, "seed": 3}
    stats = update(actor, critic, credited, settings, began=first, **options)

    other_actor, other = engines()
    with other.evaluating():
        values = answer_values(other, filled)
    torch.testing.assert_close(first.values, values, atol=1e-5, rtol=1e-5)
    apart = credit(replace(filled, values=values), ppo, settings, 1)
    torch.testing.assert_close(credited.returns, apart.returns, atol=1e-5, rtol=1e-5)
    expected = update(other_actor, other, apart, settings, **options)
    assert stats == pytest.approx(expected, abs=1e-4, rel=1e-4)
    start = help_.weights(engines()[1].module)
    assert any(not torch.equal(start[n], w) for n, w in help_.weights(critic.module).items())
    for one, two in ((critic, other), (actor, other_actor)):
        ours, theirs = help_.weights(one.module), help_.weights(two.module)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0, msg=name)


def test_the_order_within_a_minibatch_changes_nothing() -> None:
    """30: with one minibatch the permutation does not matter."""
    found = [run(scored_rollout(), ppo_settings(), seed=seed, size=2) for seed in (1, 2)]
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4, rel=1e-4)


def test_every_row_once_per_epoch_in_new_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """31: each PPO epoch is another permutation of all rows."""
    seen: list[list[int]] = []
    rollout = scored_rollout()

    def note(_: Any, batches: list[Rollout], *__: Any) -> float:
        seen.append([int(score * 1e6) for batch in batches for score in batch.scores])
        return 0.0

    monkeypatch.setattr(update_module, "critic_step", note)
    run(rollout, ppo_settings(epochs=4, minibatches=3), train_actor=False)
    everything = sorted(int(score * 1e6) for score in rollout.scores)
    epochs = [seen[i : i + 3] for i in range(0, 12, 3)]
    for epoch in epochs:
        assert sorted(row for part in epoch for row in part) == everything
    assert len({tuple(map(tuple, (sorted(part) for part in epoch))) for epoch in epochs}) > 1


def test_early_stop_counts_what_it_skips() -> None:
    """35: after the bound is passed the actor's remaining steps are skipped and counted; the
    critic goes on."""
    rollout = fresh(scored_rollout())
    settings = ppo_settings(epochs=4, minibatches=2, target_kl=1e-4)
    steps: list[int] = []
    stats, actor, critic = run(rollout, settings, lr=2e-2, after_step=lambda: steps.append(1))
    # The first step is on policy (KL 0), the second sees the first one's change.
    assert len(steps) == 2
    assert stats["skipped_updates"] == 6
    assert actor.deepspeed.global_steps == 2
    assert critic.deepspeed.global_steps == 8
    free, actor, _ = run(rollout, ppo_settings(epochs=4, minibatches=2), lr=2e-2)
    assert free["skipped_updates"] == 0
    assert actor.deepspeed.global_steps == 8


def test_critic_warm_up() -> None:
    """34: only the critic moves; nothing counts as skipped."""
    before = help_.weights(help_.load_policy(name=help_.lively()))
    stats, actor, critic = run(scored_rollout(), ppo_settings(), train_actor=False)
    assert stats["skipped_updates"] == 0
    assert "policy_loss" not in stats
    assert all(torch.equal(t, before[n]) for n, t in help_.weights(actor.module).items())
    assert critic.deepspeed.global_steps == 2
    assert stats["value_loss"] > 0


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_loss_pulls_to_the_reference(kind: str) -> None:
    """22, 37: k2 or k3 of policy and reference, averaged over counted tokens, times its weight."""
    rollout = scored_rollout()
    none = replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    models_ = roles(critic=False)
    with models_.actor.evaluating():
        new = policy_log_probs(models_.actor, none, 1.0)
    d = (new - none.ref_log_probs)[none.answer_mask].double()
    expected = {"k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind].mean().item()
    settings = ppo_settings(epochs=1, kl_loss=kind)
    stats, _, _ = run(none, settings, critic=False, kl_loss_coef=0.5)
    assert stats["kl_loss"] == pytest.approx(expected, rel=1e-4)
    assert stats["actor_grad_norm"] > 0.01
    still, _, _ = run(none, ppo_settings(epochs=1), critic=False)
    assert still["actor_grad_norm"] == 0
    assert "kl_loss" not in still


def test_entropy_bonus_flattens() -> None:
    rollout = scored_rollout()
    none = replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    stats, actor, _ = run(none, ppo_settings(epochs=3, entropy_coef=1.0), critic=False, lr=5e-3)
    after = update(
        actor, None, none, ppo_settings(epochs=1), temperature=1.0, micro_batch_size=6, seed=1
    )
    assert after["entropy"] > stats["entropy"] + 0.05


def test_ptx_mixes_the_sft_loss() -> None:
    """36: with no advantage the step is that of coef x SFT loss over its own tokens."""
    rollout = scored_rollout()
    none = replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    rows = help_.sft_rows()

    asked = []

    def take(count: int) -> Any:
        asked.append(count)
        return help_.sft_batches(rows, 4)

    stats, _, _ = run(
        none, ppo_settings(epochs=1), size=3, critic=False, ptx=PtxBatches(take, 0.25)
    )
    assert asked == [len(rollout)], "as many SFT rows as the minibatch has answers"
    policy = help_.load_policy(name=help_.lively())
    batch = data.collate_sft(rows, help_.PAD)
    logits = policy.model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
    )
    (0.25 * loss).backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm()
    assert stats["ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert stats["actor_grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert stats["approx_kl"] > 0, "means are over the rollout's tokens alone"


def test_explained_variance() -> None:
    rollout = scored_rollout()
    perfect = replace(rollout, values=rollout.returns)
    assert value_quality(perfect)["explained_variance"] == pytest.approx(1.0)
    counted = rollout.answer_mask
    assert rollout.returns is not None
    assert rollout.values is not None
    residual = (rollout.returns - rollout.values)[counted].var(unbiased=False)
    expected = 1 - residual / rollout.returns[counted].var(unbiased=False)
    assert value_quality(rollout)["explained_variance"] == pytest.approx(expected.item(), abs=1e-5)
    assert value_quality(replace(rollout, values=None)) == {}
