"""step3_ppo.rollout and experience: cutting rows up changes no number."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.algo.algorithms import ALGORITHMS
from rlhf.algo.kl import AdaptiveKL, FixedKL
from rlhf.config.schema import EngineConfig, RolloutConfig
from rlhf.data.batches import collate_prompts
from rlhf.engine.train import FrozenEngine
from rlhf.rollout import build_rollout
from step3_ppo.experience import (
    answer_scores,
    answer_values,
    correct_sampler,
    credit,
    generate,
    policy_log_probs,
    reward,
    score,
)
from step3_ppo.roles import Roles
from step3_ppo.rollout import Rollout, answer_ids
from tests.unit import model_help as help_
from tests.unit.steps_help import bare_rollout, ppo_settings, scored_rollout


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


def frozen(module: Any) -> FrozenEngine:
    return FrozenEngine(module, EngineConfig(), dtype="float32")


def test_rows_cut_only_pads() -> None:
    """A row alone has no pad column on either side, and every real token, mask and value."""
    rollout = scored_rollout()
    for i in range(len(rollout)):
        row = rollout.rows(torch.tensor([i]))
        mask, answer = rollout.attention_mask[i], rollout.answer_mask[i]
        assert row.attention_mask.all()
        assert row.input_ids[0].tolist() == rollout.input_ids[i][mask].tolist()
        assert row.answer_mask.sum() == answer.sum() == row.answer_mask.shape[1]
        assert row.prompt_width == int(mask.sum() - answer.sum())
        assert row.score_mask[0].tolist() == [False] * row.prompt_width + [True] * int(answer.sum())
        for field in fields(Rollout):
            value, part = getattr(rollout, field.name)[i], getattr(row, field.name)[0]
            if value.dim() == 1 and len(value) == len(answer):
                assert torch.equal(part, value[answer]), field.name
            elif value.dim() == 0:
                assert torch.equal(part, value), field.name


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**20))
def test_micro_batches_partition(rows: int, size: int, seed: int) -> None:
    """Every row once, at most `size` together, as few as possible, long with long."""
    rollout = bare_rollout(rows=rows, seed=seed)
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    parts = rollout.micro_batches(index, size)
    assert sorted(torch.cat(parts).tolist()) == list(range(rows))
    assert max(map(len, parts)) <= size
    assert len(parts) == -(-rows // size)
    lengths = rollout.attention_mask.sum(1)
    shortest, longest = [lengths[p].min() for p in parts], [lengths[p].max() for p in parts]
    assert all(a >= b for a, b in zip(shortest, longest[1:], strict=False))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**20))
def test_map_keeps_the_rows_order(rows: int, size: int, seed: int) -> None:
    """Per row and per token: the parts land where their rows and columns are."""
    rollout = scored_rollout(rows=rows, seed=seed)
    assert torch.equal(rollout.map(lambda r: r.scores, size), rollout.scores)
    assert torch.equal(rollout.map(lambda r: r.returns, size), rollout.returns)


def test_trimming_changes_no_model_output() -> None:
    """13: log-probs, values and scores in micro-batches of any size equal those of the whole."""
    policy = frozen(help_.load_policy(name=help_.lively()))
    value = frozen(help_.load_value(name=help_.reward_dir(), new_head=False))
    rollout = bare_rollout()
    for compute in (
        lambda r: policy_log_probs(policy, r, 0.7),
        lambda r: answer_values(value, r),
        lambda r: answer_scores(value, r),
    ):
        whole = compute(rollout)
        assert whole.abs().sum() > 1
        for size in (1, 2, 4, 6):
            torch.testing.assert_close(rollout.map(compute, size), whole, atol=2e-5, rtol=1e-5)


def test_values_are_those_before_each_token() -> None:
    """25: V_t is read at the position before answer token t, normalised; 0 past the end."""
    module = help_.load_value(name=help_.reward_dir(), new_head=False)
    engine = frozen(module)
    rollout = bare_rollout()
    values = answer_values(engine, rollout)
    for i in range(len(rollout)):
        ids = rollout.input_ids[i][rollout.attention_mask[i]]
        length = int(rollout.answer_mask[i].sum())
        raw = engine(ids[None], torch.ones(1, len(ids), dtype=torch.bool))[0]
        expected = (raw[len(ids) - length - 1 : len(ids) - 1] - 0.25) / 2.0
        torch.testing.assert_close(values[i, :length], expected, atol=1e-5, rtol=1e-5)
        assert not values[i, length:].any()
        # 6: the score is the raw value at the last token.
        assert answer_scores(engine, rollout)[i].item() == pytest.approx(raw[-1].item(), abs=1e-5)


def roles(critic: bool = True, actor_dtype: str = "float32") -> Any:
    value: dict[str, Any] = {"name": help_.reward_dir(), "new_head": False}
    return Roles(
        actor=help_.train_engine(help_.load_policy(name=help_.lively()), learning_rate=1e-3),
        reference=frozen(help_.load_policy(name=help_.lively())),
        reward=frozen(help_.load_value(**value)),
        critic=help_.train_engine(help_.load_value(**value)) if critic else None,
        actor_dtype=actor_dtype,
    )


def sample(engine: Any, temperature: float = 0.8, samples: int = 2) -> Any:
    prompts = [
        {"prompt_ids": [5, 6, 7, 8], "prompt": "a"},
        {"prompt_ids": [9], "prompt": "b"},
        {"prompt_ids": [12, 40, 33, 7, 9, 18], "prompt": "c"},
    ]
    sampler = build_rollout(
        "continuous", engine.deepspeed, help_.tokenizer(), batch_size=4, seed=3, rank=0
    )
    settings_ = RolloutConfig(
        samples_per_prompt=samples, max_new_tokens=7, temperature=temperature, prompts=3
    )
    with engine.evaluating():
        return generate(sampler, collate_prompts(prompts, help_.PAD), settings_)


def test_old_log_probs_of_the_rollout_are_the_updates() -> None:
    """14, 15, 20: what the sampler notes equals a fresh forward at the same temperature; samples
    of a prompt are neighbours."""
    models_ = roles(critic=False)
    rollout = sample(models_.actor)
    assert len(rollout) == 6
    for i in range(0, 6, 2):
        width = rollout.prompt_width
        assert torch.equal(rollout.input_ids[i, :width], rollout.input_ids[i + 1, :width])
    with models_.actor.evaluating():
        fresh = policy_log_probs(models_.actor, rollout, 0.8)
        other = policy_log_probs(models_.actor, rollout, 1.0)
    assert rollout.log_probs is not None
    torch.testing.assert_close(rollout.log_probs, fresh, atol=1e-5, rtol=1e-5)
    assert (other - fresh).abs().max() > 0.01
    ids = answer_ids(rollout)
    assert [len(row) for row in ids] == rollout.answer_mask.sum(1).tolist()
    for row, end in zip(ids, rollout.ended.tolist(), strict=True):
        assert (row[-1] == 2) == end
        assert 2 not in row[:-1], "16: nothing after the first EOS"


def test_score_reads_all_four_models() -> None:
    """12, 34: at the start reference = policy, critic = reward model on the normalised scale."""
    models_ = roles()
    rollout = sample(models_.actor)
    scored = score(models_, rollout, 0.8, 2)
    assert scored.log_probs is rollout.log_probs, "fp32: the rollout's own"
    torch.testing.assert_close(scored.log_probs, scored.ref_log_probs, atol=1e-5, rtol=1e-5)
    expected = answer_values(models_.reward, rollout)
    torch.testing.assert_close(scored.values, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored.scores, answer_scores(models_.reward, rollout))
    assert score(models_, rollout, 0.8, 2, values=False).values is None
    recomputed = score(roles(critic=False, actor_dtype="bfloat16"), rollout, 0.8, 3)
    assert recomputed.log_probs is not rollout.log_probs, "16 bits: a whole forward"
    assert recomputed.values is None


def hand_rollout() -> Any:
    """Two answers of 2 and 1 tokens after a prompt of one; the second did not end."""
    mask = torch.tensor([[True, True], [True, False]])
    return Rollout(
        input_ids=torch.tensor([[5, 6, 2], [5, 7, 0]]),
        attention_mask=torch.tensor([[True, True, True], [True, True, False]]),
        answer_mask=mask,
        ended=torch.tensor([True, False]),
        log_probs=torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]),
        ref_log_probs=torch.tensor([[-1.5, -1.0], [-0.25, 0.0]]),
        values=torch.tensor([[0.5, 0.25], [1.0, 0.0]]),
        scores=torch.tensor([30.0, 1.0]),
    )


def rewarded(settings: Any, controller: Any = None, statistics=(0.0, 1.0), kl_in_reward=True):  # type: ignore[no-untyped-def]
    return reward(
        hand_rollout(),
        settings,
        controller or FixedKL(0.1),
        statistics,
        kl_in_reward=kl_in_reward,
    )


def test_credit_by_hand() -> None:
    """10, 17, 21, 23, 25, 26: normalise, clip at 5, take off 1 without EOS, then the KL per token
    and the score on the last; GAE with gamma 1, lambda 0.5; returns before whitening."""
    plain = ppo_settings(kl_coef=0.1, lam=0.5, whiten_advantages=False)
    rollout, stats = rewarded(plain, statistics=(2.0, 4.0))
    rollout = credit(rollout, ALGORITHMS["ppo"], plain, group_size=1)
    # (30 - 2) / 4 = 7 -> 5; (1 - 2) / 4 = -0.25 -> -1.25.
    # rewards: [-0.1 * 0.5, -0.1 * -1 + 5] = [-0.05, 5.1]; [-0.1 * -0.25 - 1.25] = [-1.225]
    # delta: [-0.05 + 0.25 - 0.5, 5.1 - 0.25] = [-0.3, 4.85]; [-1.225 - 1] = [-2.225]
    expected = torch.tensor([[-0.3 + 0.5 * 4.85, 4.85], [-2.225, 0.0]])
    assert rollout.advantages is not None
    torch.testing.assert_close(rollout.advantages, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rollout.returns, expected + rollout.values, atol=1e-6, rtol=1e-6)
    assert stats["score_mean"] == 15.5
    assert stats["score_std"] == pytest.approx(14.5)
    assert stats["score_normalised"] == pytest.approx((7 - 0.25) / 2)
    assert stats["reward_mean"] == pytest.approx((5 - 1.25) / 2)
    assert stats["kl_per_answer"] == pytest.approx((0.5 - 1.0 - 0.25) / 2)
    assert stats["kl_per_token"] == pytest.approx((0.5 - 1.0 - 0.25) / 3)
    assert stats["kl_k2"] == pytest.approx((0.5**2 + 1.0**2 + 0.25**2) / 2 / 3)
    k3 = [math.exp(-d) - 1 + d for d in (0.5, -1.0, -0.25)]
    assert stats["kl_k3"] == pytest.approx(sum(k3) / 3)
    assert (stats["answer_length"], stats["eos_fraction"]) == (1.5, 0.5)
    assert (stats["answers"], stats["tokens"], stats["kl_coef"]) == (2.0, 3.0, 0.1)


def test_another_sampler_is_corrected_and_its_gap_told() -> None:
    """By hand: |gaps| ln 2, ln 4, 0 over three tokens; weights 2 -> 1.5 (cap), 1/4, 1."""
    three = torch.ones(1, 3, dtype=torch.bool)
    rollout = Rollout(
        input_ids=torch.tensor([[5, 6, 7, 8]]),
        attention_mask=torch.ones(1, 4, dtype=torch.bool),
        answer_mask=three,
        ended=torch.tensor([True]),
        log_probs=torch.tensor([[0.4, 0.1, 0.3]]).log(),
        sampler_log_probs=torch.tensor([[0.2, 0.4, 0.3]]).log(),
        advantages=torch.tensor([[2.0, 4.0, -1.0]]),
    )
    same, stats = correct_sampler(rollout, None)
    assert same is rollout
    assert stats["sampler_gap"] == pytest.approx(math.log(8) / 3, abs=1e-6)
    assert stats["sampler_gap_max"] == pytest.approx(math.log(4), abs=1e-6)
    corrected, stats = correct_sampler(rollout, 1.5)
    assert torch.allclose(corrected.need("advantages"), torch.tensor([[3.0, 1.0, -1.0]]))
    assert stats["importance_weight"] == pytest.approx((1.5 + 0.25 + 1) / 3, abs=1e-6)
    assert correct_sampler(replace(rollout, sampler_log_probs=None), None)[1] == {}


def test_credit_whitens() -> None:
    """27: mean 0 and variance 1 over the counted tokens; the returns are not whitened (26)."""
    off, ppo = ppo_settings(whiten_advantages=False), ALGORITHMS["ppo"]
    rollout, _ = rewarded(off)
    plain = credit(rollout, ppo, off, 1)
    white = credit(rollout, ppo, ppo_settings(), 1)
    assert torch.equal(credit(rollout, ppo, ppo_settings(), 1, whiten=False).advantages,
                       plain.advantages)  # fmt: skip
    assert white.advantages is not None
    counted = white.advantages[white.answer_mask]
    assert counted.mean().item() == pytest.approx(0, abs=1e-6)
    assert counted.var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(white.returns, plain.returns)


def test_credit_moves_the_controller_after_use() -> None:
    """24: the coefficient that was used is logged; the next one follows the KL seen."""
    controller = AdaptiveKL(0.1, target=1.0, horizon=10.0)
    _, stats = rewarded(ppo_settings(), controller=controller)
    assert stats["kl_coef"] == 0.1
    assert controller.coef == pytest.approx(0.1 * (1 - 0.2 * 2 / 10))


def test_kl_as_a_loss_is_not_in_the_reward() -> None:
    """22, 37: for GRPO the coefficient touches the advantages only with the KL in the reward."""

    def advantages(coef: float, kl_in_reward: bool) -> torch.Tensor:
        settings = ppo_settings(group_std=False)
        rollout, _ = rewarded(settings, FixedKL(coef), kl_in_reward=kl_in_reward)
        found: torch.Tensor = credit(rollout, ALGORITHMS["grpo"], settings, 2).need("advantages")
        return found

    assert torch.equal(advantages(0.0, False), advantages(9.0, False))
    # Scores 5 (clipped) and 1 - 1 = 0; KL -0.5 and -0.25 nats: wholes 5 + 1 and 0 + 0.5 at coef 2.
    assert advantages(2.0, True).tolist() == [[2.75, 2.75], [-2.75, 0.0]]


def test_normalisation_can_be_turned_off() -> None:
    settings = ppo_settings(normalize_score=False, score_clip=100.0)
    _, stats = rewarded(settings, controller=FixedKL(0.0), statistics=(2.0, 4.0))
    assert stats["reward_mean"] == pytest.approx((30 + 1 - 1) / 2)
    assert SimpleNamespace(**stats).score_normalised == pytest.approx(15.5)
