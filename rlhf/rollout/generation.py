"""What a rollout returns, and the checks and small helpers that every engine shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.rollout import RolloutBatch, RolloutRequest
from torch import Tensor, nn

from rlhf.errors import ConfigError, RequirementError


@dataclass
class Generation(RolloutBatch):
    """A finished rollout: B = prompts * samples rows, sample j of prompt i in row i * samples + j.

    Inherited: `input_ids` (B, P + A) int64, left-padded prompt then right-padded answer;
    `attention_mask` (B, P + A) int64; `response_start_idx` (B,) int64, all equal to P.
    """

    answer_mask: Tensor  # (B, A) bool, True up to and including the token that ended the answer
    ended: Tensor  # (B,) bool, True if EOS or a stop string ended it, False if the limit did
    log_probs: Tensor | None = None  # (B, A) fp32, 0 where not counted; None: not captured
    # log_probs come from the trained weights in fp32: equal to a forward's, up to fp32's rounding,
    # so they may serve as old log-probs.
    exact: bool = False
    # (B, A) fp32: what another engine (vLLM) says it sampled with; never old log-probs.
    sampler_log_probs: Tensor | None = None
    # With stop strings: prompt + answer as they are read by who judges the answer, (B, P + R)
    # int64, the mask (B, P + R) bool. A stop string is removed, EOS is in its place (16).
    read_ids: Tensor | None = None
    read_mask: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, width = self.answer_mask.shape
        if rows != self.batch_size or self.ended.shape != (rows,) or width > self.seq_len:
            raise ValueError(
                f"answer_mask {tuple(self.answer_mask.shape)} and ended {tuple(self.ended.shape)} "
                f"do not fit input_ids {tuple(self.input_ids.shape)}"
            )
        for name in ("log_probs", "sampler_log_probs"):
            given = getattr(self, name)
            if given is not None and given.shape != self.answer_mask.shape:
                raise ValueError(
                    f"{name} {tuple(given.shape)} must have answer_mask's shape "
                    f"{tuple(self.answer_mask.shape)}"
                )

    def with_answers(self, rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
        """(B, P + R) int64 ids and bool mask: these prompts, then other answers, right-padded."""
        start = self.seq_len - self.answer_mask.shape[1]
        prompts, mask = self.input_ids[:, :start], self.attention_mask[:, :start].bool()
        width = max(map(len, rows))
        padded = [[*row, *[pad] * (width - len(row))] for row in rows]
        lengths = torch.tensor([len(row) for row in rows], device=prompts.device)
        real = torch.arange(width, device=prompts.device) < lengths[:, None]
        answers = torch.tensor(padded, device=prompts.device)
        return torch.cat([prompts, answers], dim=1), torch.cat([mask, real], dim=1)

    @property
    def answers(self) -> Tensor:
        """(B, A) int64 answer tokens, pad after the end."""
        return self.input_ids[:, self.seq_len - self.answer_mask.shape[1] :]


def assemble(
    request: RolloutRequest,
    samples: int,
    answers: Tensor,
    lengths: Tensor,
    ended: Tensor,
    pad: int,
    log_probs: Tensor | None = None,
) -> Generation:
    """Join prompts (N, P) and answers (N * samples, >= max length); `lengths` (N * samples,)
    counts each answer's tokens, its ending token included. Whatever follows becomes pad."""
    width = int(lengths.max())
    mask = torch.arange(width, device=answers.device) < lengths[:, None]
    answers = answers[:, :width].masked_fill(~mask, pad)
    prompts = request.prompt_ids.repeat_interleave(samples, dim=0)
    prompt_mask = request.prompt_attention_mask.repeat_interleave(samples, dim=0)
    return Generation(
        input_ids=torch.cat([prompts, answers], dim=1),
        attention_mask=torch.cat([prompt_mask.long(), mask.long()], dim=1),
        response_start_idx=torch.full_like(lengths, prompts.shape[1]),
        answer_mask=mask,
        ended=ended,
        log_probs=None if log_probs is None else log_probs[:, :width].masked_fill(~mask, 0.0),
    )


def prompt_lengths(request: RolloutRequest) -> Tensor:
    """(N,) int64 real tokens of each prompt.

    Raises:
        ValueError: no row, an empty prompt, or a prompt that is not left-padded.
    """
    mask = request.prompt_attention_mask.bool()
    lengths = mask.sum(dim=1)
    if mask.numel() == 0 or bool((lengths == 0).any()):
        raise ValueError("rollout request has no row, or a prompt without tokens")
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("rollout prompts must be left-padded: real tokens at the right edge")
    return lengths


def check_fits(model: Any, longest_prompt: int, max_new_tokens: int) -> None:
    """Raise ConfigError where prompt + answer exceed the model's positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens {max_new_tokens} must be at least 1")
    if limit is not None and longest_prompt + max_new_tokens > limit:
        raise ConfigError(
            f"a prompt of {longest_prompt} tokens and max_new_tokens {max_new_tokens} exceed the "
            f"model's {limit} positions: lower max_prompt_length or rollout.max_new_tokens"
        )


def base_model(model: Any) -> Any:
    """The Hugging Face model itself, below peft's wrapper if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def special_ids(tokenizer: Any) -> tuple[int, int]:
    """(pad, eos). Raises RequirementError unless both exist and differ (ALGORITHM.md 1)."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or eos is None or pad == eos:
        raise RequirementError(
            f"the tokenizer has pad token {pad} and EOS token {eos}: rollout needs both, and "
            "different; run step 1, which adds a pad token, or set tokenizer.pad_token"
        )
    return int(pad), int(eos)


def causal_lm(module: Any) -> Any:
    """The Hugging Face (or peft) causal model inside an engine's module."""
    return module if hasattr(module, "prepare_inputs_for_generation") else module.model


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, ALGORITHM.md 18) inside; each submodule's mode back after."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
