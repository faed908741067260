"""One frozen base for four roles: the same numbers as four models of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from rlhf import models
from rlhf.config.schema import RLConfig
from rlhf.engine.checkpoint import load_engine, save_engine
from rlhf.errors import ConfigError
from rlhf.rollout import build_rollout, gathering
from step3_ppo.experience import generate, score
from step3_ppo.roles import load_roles
from step3_ppo.update import update
from tests.unit import model_help as help_
from tests.unit.steps_help import scored_rollout

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


@pytest.fixture(scope="module", params=["llama", "opt"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def lora_reward(family: str, base: str | None = None) -> str:
    """A reward model as step 2 leaves it: LoRA on the SFT model's last layer, other than 0."""
    path = help_.scratch() / f"lora-reward-{family}-{'other' if base else 'same'}"
    if not path.exists():
        lora = {"rank": 3, "alpha": 5.0, "last_layers": 1}
        module = help_.load_value(family, name=base or help_.lively(family), lora=lora, seed=5)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
        module.set_statistics(0.25, 2.0)
        models.Snapshot(module).write(path, help_.tokenizer(family), card="")
    return str(path)


def settings(share: bool | str, **changes: Any) -> RLConfig:
    role = {"model": {"lora": LORA}, "optim": {"learning_rate": 1e-2}}
    return RLConfig(
        **{"actor": role, "critic": role, "share_base": share, "micro_batch_size": 3,
           "rollout": {"max_prompt_length": 9, "max_new_tokens": 8}} | changes
    )  # fmt: skip


def load(share: bool | str, family: str, **changes: Any) -> Any:
    roles = load_roles(
        settings(share, **changes), help_.tokenizer(family), sft=help_.lively(family),
        reward=lora_reward(family), actor_steps=10, critic_steps=10, needs_critic=True,
        say=lambda _: None,
    )  # fmt: skip
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for engine, own in ((roles.actor, ".default."), (roles.critic, None)):
            own = own or (".critic." if share else ".default.")
            for name, parameter in engine.module.named_parameters():
                if "lora_" in name and own in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
    return roles


def test_equals_four_models(family: str) -> None:
    """12, 34: log-probs, scores, values, one iteration's update and what is published."""
    found = []
    for share in (True, False):
        roles = load(share, family)
        rollout = replace(scored_rollout(), log_probs=None, ref_log_probs=None, values=None)
        scored = score(roles, rollout, 0.9, 3)
        filled = replace(scored, advantages=scored_rollout().advantages)
        filled = replace(filled, returns=scored_rollout().returns)
        stats = update(
            roles.actor, roles.critic, filled, settings(share).ppo, temperature=0.9,
            micro_batch_size=2, seed=1, kl_loss_coef=0.1,
        )  # fmt: skip
        after = score(roles, rollout, 0.9, 3)
        states = [models.Snapshot(e.module).state for e in (roles.actor, roles.critic)]
        found.append((roles, scored, stats, after, states))
    (_, ours, stats, after, states), (_, theirs, plain_stats, plain_after, plain_states) = found
    for one, other in ((ours, theirs), (after, plain_after)):
        for name in ("log_probs", "ref_log_probs", "values", "scores"):
            torch.testing.assert_close(
                getattr(one, name), getattr(other, name), atol=2e-5, rtol=2e-5, msg=name
            )
    assert stats == pytest.approx(plain_stats, rel=1e-3, abs=1e-5)
    assert (after.values - ours.values).abs().max() > 1e-3, "the critic moved"
    assert (after.log_probs - ours.log_probs).abs().max() > 1e-3, "the policy moved"
    assert torch.equal(after.ref_log_probs, ours.ref_log_probs)
    assert torch.equal(after.scores, ours.scores)
    for state, plain in zip(states, plain_states, strict=True):
        assert state.keys() == plain.keys()
        for name in plain:
            torch.testing.assert_close(state[name], plain[name], atol=5e-5, rtol=1e-4, msg=name)


def test_the_base_is_there_once(family: str) -> None:
    """Each engine trains only its own; the base's weights are the same tensors in all roles."""
    roles = load(True, family)
    engines = (roles.actor, roles.reference, roles.reward, roles.critic)
    seen = [dict(e.module.named_parameters()) for e in engines]
    base = [{p.data_ptr() for n, p in s.items() if "lora_" not in n and n != "score.weight"}
            for s in seen]  # fmt: skip
    assert base[0] == base[1] == base[2] == base[3]
    trained = [{p.data_ptr() for p in s.values() if p.requires_grad} for s in seen]
    assert trained[1] == trained[2] == set()
    assert trained[0]
    assert trained[3]
    assert not trained[0] & trained[3]
    for engine in (roles.actor, roles.critic):
        assert {n for n in engine.module.state_dict() if "lora_" in n} == {
            n for n, _ in engine.module.named_parameters() if "lora_" in n
        }
    groups = roles.actor.deepspeed.optimizer.param_groups
    assert {p.data_ptr() for g in groups for p in g["params"]} == trained[0]


def test_each_answers_as_itself(family: str) -> None:
    """The sampler gets the policy's adapters by default, the reference's none for the verdict."""
    from rlhf.data.batches import collate_prompts

    shared, alone = load(True, family), load(False, family)
    prompts = collate_prompts([{"prompt_ids": [5, 6, 7], "prompt": ""}] * 4, help_.PAD)
    tokens = []
    for roles in (shared, alone):
        for engine in (roles.actor, roles.reference):
            how = gathering("auto", "continuous", engine.module).options
            sampler = build_rollout(
                "continuous", engine, help_.tokenizer(family), batch_size=4, **how
            )
            tokens.append(generate(sampler, prompts, settings(True).rollout).input_ids)
    assert torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[1], tokens[3])
    assert not torch.equal(tokens[0], tokens[1])


def test_what_it_publishes(family: str, tmp_path: Path) -> None:
    """Plain Hugging Face directories; the policy's adapters apart, and nobody else's."""
    roles = load(True, family)
    for name, engine in (("actor", roles.actor), ("critic", roles.critic)):
        models.Snapshot(engine.module).write(tmp_path / name, help_.tokenizer(family), card="")
    rollout = scored_rollout()
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").eval()
    assert critic.config.rlhf_score_std == 2.0
    mask = rollout.attention_mask
    lengths = mask.sum(1)
    row = rollout.input_ids[0, mask[0]][None]
    with torch.no_grad():
        values = roles.critic.module(row, torch.ones_like(row, dtype=torch.bool))
        torch.testing.assert_close(critic(row).logits[0, 0], values[0, int(lengths[0]) - 1])
    base = help_.load_policy(family, name=help_.lively(family)).model
    again = PeftModel.from_pretrained(base, str(tmp_path / "actor" / "adapter"))
    with torch.no_grad():
        logits = again(row).logits[:, :-1].log_softmax(-1)
        wanted = logits.gather(-1, row[:, 1:, None]).squeeze(-1)
        one = torch.ones_like(row, dtype=torch.bool)
        found, _ = roles.actor.module(row, one, one)
    torch.testing.assert_close(found[:, 1:], wanted, atol=2e-5, rtol=1e-4)


def test_gradient_checkpointing(family: str) -> None:
    """Activations that are made again in the backward pass use the same role's adapters."""
    norms = []
    for checkpointing in (False, True):
        role = {"model": {"lora": LORA, "gradient_checkpointing": checkpointing}}
        roles = load(True, family, actor=role, critic=role)
        stats = update(
            roles.actor, roles.critic, scored_rollout(), settings(True).ppo, temperature=1.0,
            micro_batch_size=6, seed=1,
        )  # fmt: skip
        norms.append((stats["actor_grad_norm"], stats["critic_grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"actor": {}}, r"actor trains all.*step3.actor.model.lora.rank"),
        ({"critic": {}}, r"critic trains all"),
        ({"critic": {"model": {"lora": LORA, "name": "x/y"}}}, r"critic has a model of its own"),
        ({"critic": {"model": {"lora": LORA, "dtype": "bfloat16"}}}, r"different dtypes"),
        ({"reference_engine": {"zero_stage": 3}}, r"ZeRO-3 .* reference's"),
        (
            {"rollout": {"engine": "hybrid", "max_prompt_length": 9, "max_new_tokens": 8}},
            r"hybrid rollout",
        ),
    ],
)
def test_what_prevents_it(changes: dict[str, Any], words: str) -> None:
    """`true` says what prevents it and what to do; `auto` goes on with four models."""
    with pytest.raises(ConfigError, match=words + r".*share_base to auto or false"):
        load(True, "llama", **changes)


def test_another_base_is_seen() -> None:
    """Adapters on another base, or a reward model without adapters, are refused."""
    sft, common = help_.lively(), {"needs_critic": True}
    assert models.why_not_shared(settings(True), sft, lora_reward("llama"), **common) is None
    reason = models.why_not_shared(settings(True), sft, help_.reward_dir(), **common)
    assert "no adapters kept apart" in str(reason)
    foreign = lora_reward("llama", base=help_.tiny())
    reason = models.why_not_shared(settings(True), sft, foreign, **common)
    assert "another base" in str(reason)
    lines: list[str] = []
    roles = load_roles(
        settings("auto"), help_.tokenizer(), sft=sft, reward=foreign, actor_steps=1,
        critic_steps=1, needs_critic=True, say=lines.append,
    )  # fmt: skip
    assert any("four models of their own" in line for line in lines)
    assert type(roles.actor.module).__name__ == "CausalModel"


def test_checkpoints(tmp_path: Path) -> None:
    """Each engine saves and reads back its own adapters and head alone; training goes on alike."""
    rollout = scored_rollout()

    def step(roles: Any, seed: int) -> dict[str, float]:
        return update(
            roles.actor, roles.critic, rollout, settings(True).ppo, temperature=1.0,
            micro_batch_size=6, seed=seed,
        )  # fmt: skip

    first = load(True, "llama")
    step(first, 1)
    for name in ("actor", "critic"):
        save_engine(getattr(first, name), tmp_path / name)
    wanted = step(first, 2)
    again = load(True, "llama")
    load_engine(again.actor, tmp_path / "actor", stage=0, world=1)
    before = {n: p.clone() for n, p in again.critic.module.named_parameters()}
    fresh = load(True, "llama").critic.module.named_parameters()
    assert all(torch.equal(before[n], p) for n, p in fresh), "the actor's state touched the critic"
    load_engine(again.critic, tmp_path / "critic", stage=0, world=1)
    assert step(again, 2) == wanted
