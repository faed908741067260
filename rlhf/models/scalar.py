"""Reward model and critic: a decoder with one number per token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf.config.schema import EngineConfig, ModelConfig
from rlhf.engine.zero3 import gathered, sharded_loading
from rlhf.errors import RequirementError
from rlhf.models.adapters import add_adapters, plain
from rlhf.models.causal import Backbone
from rlhf.models.families import no_dropout, scalar_head
from rlhf.models.loading import (
    check_complete,
    explain_load_errors,
    load_arguments,
    refuse_broken,
    refuse_kernels,
)


class ScalarHead(torch.nn.Linear):
    """`Linear(hidden, 1)` that computes in fp32 whatever the model's dtype (ALGORITHM.md 33)."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.float(), self.weight.float())


class ScalarModel(Backbone):
    """Wraps a Hugging Face ForSequenceClassification model with one label as `.model`.

    Its raw value at an answer's last token is that model's own logit. `score_mean` and `score_std`
    (kept in config.json as `rlhf_score_mean` and `rlhf_score_std`) turn raw values into normalised
    ones: statement 10 for scores, and the critic starts on the same scale.
    """

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        read: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T) ids and bool mask -> (B, T) fp32 raw values; 0 where `read` (B, T) bool, part of
        the mask, is False."""
        values = self._head(self.hidden(input_ids, attention_mask, read)).squeeze(-1)
        return values if read is None else torch.where(read, values, 0.0)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return plain(self.model).score(hidden)

    def normalize(self, values: torch.Tensor) -> torch.Tensor:
        mean, std = self.statistics
        return (values - mean) / std

    @property
    def statistics(self) -> tuple[float, float]:
        config = self.config
        return (
            float(getattr(config, "rlhf_score_mean", 0.0)),
            float(getattr(config, "rlhf_score_std", 1.0)),
        )

    def set_statistics(self, mean: float, std: float) -> None:
        self.config.rlhf_score_mean = mean
        self.config.rlhf_score_std = max(std, 1e-6)


def last_tokens(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T) bool -> (B, T) bool: each row's last real token alone."""
    later = attention_mask.flip(1).long().cumsum(1).flip(1)
    return attention_mask & (later == 1)


def last_values(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Value at each row's last real token: (B, T), (B, T) bool -> (B,) (ALGORITHM.md 6)."""
    last = last_tokens(attention_mask).long().argmax(dim=1)
    return values.gather(1, last.unsqueeze(1)).squeeze(1)


def load_scalar(
    name: str,
    settings: ModelConfig,
    *,
    engine: EngineConfig,
    dtype: str,
    pad_token_id: int,
    vocab_size: int,
    new_head: bool,
    seed: int = 0,
    dropout: bool = False,
) -> ScalarModel:
    """Reads a model with a scalar head: a directory or hub id.

    Args:
        new_head: draw the head anew (step 2); otherwise the source must have a trained one.
        seed: of the new head.

    Raises:
        RequirementError: the source has no trained scalar head but one is needed.
    """
    with explain_load_errors(name, "weights", trusted=settings.trust_remote_code):
        config = AutoConfig.from_pretrained(
            name, num_labels=1, trust_remote_code=settings.trust_remote_code
        )
        refuse_broken(name, "weights", trusted=settings.trust_remote_code)  # a hub's came just now
        refuse_kernels(name, config, settings)
        if not dropout:
            no_dropout(config)
        config.pad_token_id = pad_token_id
        with sharded_loading(engine, dtype=dtype):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head of another width; checked below
                **load_arguments(settings, dtype),
            )
            if vocab_size > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(vocab_size)
    check_complete(name, info, may_lack="score")
    without = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if not new_head and any("score" in key for key in without):
        raise RequirementError(
            f"{name!r} is not a reward model: it has no trained `score` head. Train one with "
            f"`python train.py --step 2 --reward-model {name}`, or name a model saved from "
            "AutoModelForSequenceClassification with one label."
        )
    _use_fp32_head(model, new_head, seed)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return ScalarModel(add_adapters(model, settings.lora, task="SEQ_CLS", dropout=dropout))


def _use_fp32_head(model: Any, new_head: bool, seed: int) -> None:
    """Std 1/sqrt(d + 1) when drawn anew (N, N+); there is no bias: it stays 0."""
    head: Any = scalar_head(model)
    head.__class__ = ScalarHead
    if not new_head:
        return
    width = head.in_features
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
    with gathered([head.weight], modifier_rank=0), torch.no_grad():
        if head.weight.numel():
            head.weight.copy_(fresh)
