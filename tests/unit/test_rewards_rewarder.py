"""Step 3's rewarder: texts and columns of each answer, and the weighted sum, by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.algo.kl import FixedKL
from rlhf.config.schema import RLConfig
from rlhf.data.batches import PromptBatch
from step3_ppo.experience import reward
from step3_ppo.rewarder import Rewarder, Texts
from step3_ppo.rollout import Rollout
from tests.unit import model_help as help_
from tests.unit.steps_help import ppo_settings

EOS = 2
FUNCTIONS = """
given = []

def count(prompts, answers, gold, ended):
    given.append((prompts, answers, gold, ended))
    return [10 * len(answer.split()) for answer in answers]
"""


class Tokenizer:
    """Token k is the word wk."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(f"w{i}" for i in ids if i != EOS)


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    help_.world_of_one(monkeypatch)
    (tmp_path / "counted.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "counted", raising=False)


def rollout() -> tuple[Rollout, PromptBatch]:
    """Two prompts of two tokens, two answers each: 1, 2, 2 (cut off) and 0 words."""
    answers = torch.tensor([[7, EOS, 0], [7, 8, EOS], [8, 9, 9], [EOS, 0, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    prompts = torch.tensor([[3, 4], [3, 4], [5, 6], [5, 6]])
    found = Rollout(
        input_ids=torch.cat([prompts, answers], 1),
        attention_mask=torch.cat([torch.ones(4, 2).bool(), mask], 1),
        answer_mask=mask,
        ended=torch.tensor([True, True, False, True]),
        log_probs=torch.zeros(4, 3),
        ref_log_probs=torch.zeros(4, 3),
    )
    batch = PromptBatch(prompts[::2], torch.ones(2, 2).bool(), ["a", "b"], {"gold": [5, 6]})
    return found, batch


def settings(*rewards: Any, **ppo: Any) -> RLConfig:
    return RLConfig(rewards=list(rewards), ppo={"missing_eos_penalty": 0.0, **ppo})


def test_texts() -> None:
    """Rows k n ... k n + n - 1 answer one prompt."""
    texts = Texts.of(*rollout(), Tokenizer())
    assert texts.prompts == ["a", "a", "b", "b"]
    assert texts.answers == ["w7", "w7 w8", "w8 w9", ""]
    assert texts.columns == {"ended": [True, True, False, True], "gold": [5, 5, 6, 6]}


def test_a_stop_string_is_not_part_of_the_text() -> None:
    """16: functions read what the reward model reads."""
    found, batch = rollout()
    read = found.input_ids.clone()
    read[:, 2] = EOS
    short = torch.tensor([[1, 1, 1, 0, 0]] * 4).bool()
    texts = Texts.of(replace(found, read_ids=read, read_mask=short), batch, Tokenizer())
    assert texts.answers == [""] * 4


def test_the_weighted_sum() -> None:
    """By hand, with a model's scores 1, 3, 25, -1 of mean 1 and deviation 2, clipped to +-5:
    0, 1, 5, -1. Functions are not clipped: 10 x words, 10, 20, 20, 0, times 0.5."""
    ours = settings("model", {"use": "counted:count", "weight": 0.5})
    rewarder = Rewarder(ours, Tokenizer(), (1.0, 2.0))
    found, batch = rollout()
    scored, figures = rewarder(replace(found, scores=torch.tensor([1.0, 3.0, 25.0, -1.0])), batch)
    assert scored.need("scores").tolist() == [0 + 5, 1 + 10, 5 + 10, -1 + 0]
    assert figures["term_model"] == pytest.approx((0 + 1 + 5 - 1) / 4)
    assert figures["term_count"] == pytest.approx(12.5)
    assert figures["term_count_std"] == pytest.approx(
        ((2.5**2 + 7.5**2 + 7.5**2 + 12.5**2) / 4) ** 0.5
    )
    assert figures["seconds_term_count"] >= 0
    given = sys.modules["counted"].given
    assert given == [
        (
            ["a", "a", "b", "b"],
            ["w7", "w7 w8", "w8 w9", ""],
            [5, 5, 6, 6],
            [True, True, False, True],
        )
    ]
    # The sum goes into the tokens' rewards as it is, at each answer's last token.
    assert rewarder.statistics is None
    rewarded, stats = reward(scored, ours.ppo, FixedKL(0.0), rewarder.statistics, kl_in_reward=True)
    assert rewarded.need("token_rewards").sum(1).tolist() == [5, 11, 15, -1]
    assert stats["score_normalised"] == stats["score_mean"] == stats["reward_mean"] == 7.5


def test_without_normalisation_the_models_term_is_raw() -> None:
    ours = settings("model", "counted:count", normalize_score=False, score_clip=4.0)
    found, batch = rollout()
    rewarder = Rewarder(ours, Tokenizer(), (1.0, 2.0))
    scored, _ = rewarder(replace(found, scores=torch.tensor([1.0, 3.0, 25.0, -1.0])), batch)
    assert scored.need("scores").tolist() == [11, 23, 24, -1]


def test_the_penalty_for_a_missing_eos_stays() -> None:
    ours = settings("counted:count", missing_eos_penalty=3.0)
    rewarder = Rewarder(ours, Tokenizer(), None)
    scored, _ = rewarder(*rollout())
    rewarded, _ = reward(scored, ours.ppo, FixedKL(0.0), rewarder.statistics, kl_in_reward=True)
    assert rewarded.need("token_rewards").sum(1).tolist() == [10, 20, 17, 0]


def test_a_model_alone_is_untouched() -> None:
    """The path without functions: the same object, nothing decoded, nothing logged, its scale."""
    rewarder = Rewarder(RLConfig(), None, (1.0, 2.0))
    found, batch = rollout()
    assert rewarder(found, batch)[0] is found
    assert rewarder(found, batch)[1] == {}
    assert rewarder.statistics == (1.0, 2.0)
    raw = torch.tensor([1.0, 3.0, 25.0, -1.0])
    texts = Texts([], [], {})
    terms = rewarder.terms(raw, texts, raw.device)
    assert rewarder.total(terms).tolist() == [0, 1, 12, -1], "the verdict's: not clipped"
    weighted = Rewarder(settings({"use": "model", "weight": 2.0}), Tokenizer(), (1.0, 2.0))
    assert weighted.statistics is None
    assert weighted(replace(found, scores=raw), batch)[0].need("scores").tolist() == [0, 2, 10, -2]


def test_the_model_alone_as_reward_computes_it() -> None:
    """Bit for bit the same whether `reward` normalises and clips, or the rewarder does."""
    found, batch = rollout()
    raw = torch.randn(4, generator=torch.Generator().manual_seed(3)) * 20
    found = replace(found, scores=raw)
    ppo = ppo_settings(missing_eos_penalty=1.0)
    alone, _ = reward(found, ppo, FixedKL(0.1), (0.3, 1.7), kl_in_reward=True)
    rewarder = Rewarder(
        settings("model", {"use": "length", "weight": 0.0}), Tokenizer(), (0.3, 1.7)
    )
    summed, _ = reward(rewarder(found, batch)[0], ppo, FixedKL(0.1), None, kl_in_reward=True)
    assert torch.equal(alone.need("token_rewards"), summed.need("token_rewards"))
