"""The roles of step 3: values and returns on one scale; what the reward model reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf.algo.algorithms import ALGORITHMS
from rlhf.algo.kl import FixedKL
from rlhf.config.schema import RolloutConfig
from rlhf.data.batches import collate_prompts
from rlhf.rollout import build_rollout
from step3_ppo.experience import answer_scores, credit, generate, reward, score
from step3_ppo.rollout import Rollout, answer_ids
from tests.unit import model_help as help_
from tests.unit.steps_help import scored_rollout
from tests.unit.test_models_shared import load, settings


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_values_and_returns_are_on_one_scale(share: bool, normalize: bool) -> None:
    """25, 26: a critic that gives a raw 4.0 everywhere, and a reward model that does, with
    statistics 0.25 and 2: by hand (4 - 0.25) / 2 = 1.875 when scores are normalised, 4.0 when
    not, for the value and the return alike, so that every advantage is 0."""
    ppo = {"normalize_score": normalize, "whiten_advantages": False, "missing_eos_penalty": 0.0}
    roles = load(share, "llama", ppo=ppo)
    for engine in (roles.reward, roles.critic):
        read = engine.module.forward

        def always_four(*args: Any, _read: Any = read, **kwargs: Any) -> torch.Tensor:
            given: torch.Tensor = _read(*args, **kwargs)
            return torch.where(given != 0, 4.0, 0.0)

        engine.module.forward = always_four
    rollout = replace(scored_rollout(), log_probs=None, ref_log_probs=None, values=None)
    scored = score(roles, rollout, 1.0, 3)
    counted = scored.answer_mask
    ours = settings(share, ppo=ppo).ppo
    statistics = roles.reward.module.statistics
    assert statistics == (0.25, 2.0), "the judge's own, whatever the critic's"
    rewarded, _ = reward(scored, ours, FixedKL(0.0), statistics, kl_in_reward=True)
    done = credit(rewarded, ALGORITHMS["ppo"], ours, 1)
    expected = 1.875 if normalize else 4.0
    assert done.need("values")[counted].tolist() == pytest.approx([expected] * int(counted.sum()))
    assert done.need("returns")[counted].tolist() == pytest.approx([expected] * int(counted.sum()))
    assert done.need("advantages").abs().max() < 1e-6


def answers(engine: Any, stop: list[str]) -> Rollout:
    prompts = [{"prompt_ids": [5, 6, 7 + i], "prompt": str(i)} for i in range(12)]
    sampler = build_rollout(
        "continuous", engine.deepspeed, help_.tokenizer(), batch_size=12, seed=3, stop=stop
    )
    limits = RolloutConfig(max_new_tokens=12, prompts=12)
    with engine.evaluating():
        return generate(sampler, collate_prompts(prompts, help_.PAD), limits)


def test_the_reward_model_reads_eos_in_place_of_a_stop_string() -> None:
    """16: against texts: what was sampled is trained on; the reward model, the lengths and the
    verdict's answers have the text before the stop string, then EOS, whole or in micro-batches."""
    roles, tokenizer = load(False, "llama"), help_.tokenizer()
    rollout = answers(roles.actor, ["e", "s", " th"])
    sampled = [
        ids[mask].tolist()
        for ids, mask in zip(
            rollout.input_ids[:, rollout.prompt_width :], rollout.answer_mask, strict=True
        )
    ]
    found = 0
    for tokens, read, ended in zip(
        sampled, answer_ids(rollout), rollout.ended.tolist(), strict=True
    ):
        text = tokenizer.decode(tokens)
        cuts = [text.find(s) for s in ("e", "s", " th") if s in text]
        assert ended == bool(cuts or tokens[-1] == tokenizer.eos_token_id)
        if cuts:
            found += 1
            assert read[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(read[:-1]) == text[: min(cuts)]
        else:
            assert read == tokens
    assert found > 0
    # Its score is that of a plain forward over prompt, text and EOS, one row at a time.
    whole = answer_scores(roles.reward, rollout)
    for size in (1, 5):
        parts = rollout.map(lambda r: answer_scores(roles.reward, r), size)
        torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-5)
    for row, read in enumerate(answer_ids(rollout)):
        prompt = rollout.input_ids[row, : rollout.prompt_width]
        ids = torch.cat([prompt[rollout.attention_mask[row, : len(prompt)]], torch.tensor(read)])
        alone = roles.reward(ids[None], torch.ones(1, len(ids), dtype=torch.bool))[0, -1]
        assert whole[row].item() == pytest.approx(alone.item(), abs=2e-5)
    # Log-probs are of the tokens that were sampled, the stop string's included.
    assert rollout.log_probs is not None
    assert bool((rollout.log_probs[rollout.answer_mask] < 0).all())
