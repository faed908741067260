"""Rollouts and settings for the tests of step 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rlhf.config.ppo import PPOConfig
from rlhf.models import last_tokens
from step3_ppo.rollout import Rollout
from tests.unit import model_help as help_


def ppo_settings(**changes: Any) -> PPOConfig:
    return PPOConfig(**({"epochs": 2, "minibatches": 1} | changes))


def bare_rollout(rows: int = 6, prompt: int = 9, answer: int = 8, seed: int = 0) -> Rollout:
    """Left-padded prompts and right-padded answers of random ids and lengths."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (rows, prompt + answer), generator=g)
    prompts = torch.randint(1, prompt - 1, (rows, 1), generator=g)  # column 0 is always a pad
    answers = torch.randint(1, answer, (rows, 1), generator=g)  # the last column always is
    columns = torch.arange(prompt + answer)
    mask = (columns >= prompt - prompts) & (columns < prompt + answers)
    answer_mask = mask[:, prompt:]
    ended = torch.rand(rows, generator=g) < 0.5
    return Rollout(ids.masked_fill(~mask, help_.PAD), mask, answer_mask, ended)


def scored_rollout(**sizes: Any) -> Any:  # a Rollout, none of whose fields is None
    """With everything that the update reads, made without any model."""
    rollout = bare_rollout(**sizes)
    g = torch.Generator().manual_seed(9)
    shape = tuple(rollout.answer_mask.shape)

    def draw(scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=g) * scale * rollout.answer_mask

    old = (-3 + draw(0.3)) * rollout.answer_mask
    return replace(
        rollout,
        log_probs=old,
        # As many columns as the answers: another token, EOS, stands in each one's last place.
        read_ids=rollout.input_ids.masked_fill(last_tokens(rollout.attention_mask), 2),
        read_mask=rollout.attention_mask,
        sampler_log_probs=(old + draw(0.01)) * rollout.answer_mask,
        ref_log_probs=(old + draw(0.1)) * rollout.answer_mask,
        values=draw(0.5),
        scores=torch.randn(shape[0], generator=g),
        token_rewards=0.1 * rollout.answer_mask,
        advantages=draw(1.0),
        returns=draw(1.0),
    )
