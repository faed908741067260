"""The policy: a causal language model that answers with log-probs, never with full logits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.algo.logprobs import CHUNK, TokenLoss, head_calls, head_loss, log_probs_from_hidden
from rlhf.config.schema import EngineConfig, ModelConfig
from rlhf.engine import comm
from rlhf.engine.zero3 import is_sharded, sharded_loading
from rlhf.models.adapters import add_adapters, plain
from rlhf.models.attention import fast_attention
from rlhf.models.families import logit_transform, no_dropout, takes_position_ids
from rlhf.models.loading import (
    check_complete,
    explain_load_errors,
    load_arguments,
    refuse_kernels,
)
from rlhf.models.needed import only_needed

HEAD_CHUNK = CHUNK  # token rows of logits alive at once: 256 x 50k x 4 bytes = 51 MB


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids for padded rows: cumsum(mask) - 1, 0 on left pads. (B, T) -> (B, T) int64."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def packs(config: Any) -> bool:
    """True where attention takes rows of any length side by side without a mask (flash-attention's
    varlen kernels). Elsewhere one long row costs more than the pads: docs/performance.md."""
    return str(getattr(config, "_attn_implementation", "")).startswith("flash_attention")


def packed_hidden(
    decoder: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, T, D) last hidden states, 0 on pads, from one row of the real tokens alone.

    transformers sees where rows begin by position ids that start at 0 again.
    """
    real = attention_mask[attention_mask].unsqueeze(0)
    with only_needed(decoder, real, None if read is None else read[attention_mask].unsqueeze(0)):
        found = decoder(
            input_ids=input_ids[attention_mask].unsqueeze(0),
            attention_mask=None,
            position_ids=positions(attention_mask)[attention_mask].unsqueeze(0),
            use_cache=False,
        ).last_hidden_state[0]
    whole = found.new_zeros(*input_ids.shape, found.shape[-1])
    return whole.masked_scatter(attention_mask.unsqueeze(-1), found)


class Backbone(torch.nn.Module):
    """Shared by policy and scalar model: runs the decoder without its head."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        return plain(self.model).config

    def hidden(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        read: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T) ids and bool mask -> (B, T, D) last hidden states.

        Where `read` (B, T) bool, part of the mask, is False, they may be anything finite.
        """
        decoder = plain(self.model).base_model
        extra = {}
        if takes_position_ids(decoder):
            extra["position_ids"] = positions(attention_mask)
        if extra and packs(decoder.config) and not attention_mask.all():
            return packed_hidden(decoder, input_ids, attention_mask, read)
        # Without padding the mask says nothing, and attention kernels are faster without it.
        mask = None if attention_mask.all() else attention_mask.long()
        with fast_attention(decoder), only_needed(decoder, attention_mask, read):
            return decoder(
                input_ids=input_ids, attention_mask=mask, use_cache=False, **extra
            ).last_hidden_state


class CausalModel(Backbone):
    """Wraps a Hugging Face causal LM (perhaps with peft adapters) as `.model`.

    `vocab_size` is the tokenizer's: embeddings may have more rows (Qwen pads them), and ids beyond
    it decode to nothing. They are left out of every distribution: here, and in every rollout.
    None: all rows count.
    """

    def __init__(self, model: torch.nn.Module, vocab_size: int | None = None) -> None:
        super().__init__(model)
        self.vocab_size = vocab_size

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        score_mask: torch.Tensor,
        temperature: float = 1.0,
        with_entropy: bool = False,
        token_loss: TokenLoss | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs of the tokens that count, or the sum of a loss over them.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool, False on pads.
            score_mask: (B, T) bool; position t counts the prediction of `input_ids[:, t]`.
            temperature: logits are divided by it.
            with_entropy: also the entropy of each predicted distribution, in nats.
            token_loss: see `head_loss`; it gets the counted tokens, row by row, in chunks.

        Returns:
            log_probs (B, T) fp32, 0 where not counted; entropy likewise, or None.
            With `token_loss`: the scalar fp32 loss, and None.
        """
        head = self._simple_head() if token_loss is not None else None
        counted = score_mask[:, 1:]
        hidden = self.hidden(
            input_ids, attention_mask, read=torch.nn.functional.pad(counted, (0, 1))
        )[:, :-1]
        if token_loss is not None and head is not None:
            loss = head_loss(
                hidden[counted],
                head.weight[: self.vocab_size],
                None if head.bias is None else head.bias[: self.vocab_size],
                input_ids[:, 1:][counted],
                token_loss,
                temperature,
                chunk=HEAD_CHUNK,
                with_entropy=with_entropy,
            )
            return loss, None
        causal = plain(self.model)
        whole_head = causal.get_output_embeddings()
        log_probs, entropy = log_probs_from_hidden(
            hidden,
            lambda rows: whole_head(rows)[..., : self.vocab_size],
            input_ids[:, 1:],
            temperature=temperature,
            chunk=HEAD_CHUNK,
            min_calls=self._head_calls(counted),
            mask=counted,
            logit_transform=logit_transform(causal.config),
            with_entropy=with_entropy,
        )
        if token_loss is not None:
            entropies = None if entropy is None else entropy[counted]
            return token_loss(log_probs[counted], entropies, slice(0, int(counted.sum()))), None
        pad = (1, 0)
        log_probs = torch.nn.functional.pad(log_probs, pad)
        return log_probs, None if entropy is None else torch.nn.functional.pad(entropy, pad)

    def _simple_head(self) -> torch.nn.Linear | None:
        """The head, where its logits are a plain product with weights that are all here."""
        causal = plain(self.model)
        head = causal.get_output_embeddings()
        hooked = head._forward_hooks or head._forward_pre_hooks
        if type(head) is not torch.nn.Linear or hooked or is_sharded(head.parameters()):
            return None
        trained_bias = head.bias is not None and head.bias.requires_grad
        return None if trained_bias or logit_transform(causal.config) else head

    def _head_calls(self, counted: torch.Tensor) -> int:
        """Under ZeRO-3 every head call is a collective: ranks agree on the largest number."""
        if not is_sharded(self.model.parameters()):
            return 1
        calls = torch.tensor(head_calls(int(counted.sum()), HEAD_CHUNK), device=counted.device)
        return int(comm.all_reduce(calls, "max"))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        return model.generate(*args, **kwargs)


def load_causal(
    name: str,
    settings: ModelConfig,
    *,
    engine: EngineConfig,
    dtype: str,
    pad_token_id: int,
    vocab_size: int,
    dropout: bool,
) -> CausalModel:
    """Reads a causal LM: a directory or hub id.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        vocab_size: the tokenizer's; embeddings grow to it if it added tokens.
        dropout: False sets every dropout to 0, as step 3 needs.
    """
    trusted = settings.trust_remote_code
    with explain_load_errors(name, "weights", trusted=trusted):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    refuse_kernels(name, config, settings)
    if not dropout:
        no_dropout(config)
    shards = sharded_loading(engine, dtype=dtype)
    with explain_load_errors(name, "weights", trusted=trusted), shards:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, output_loading_info=True, **load_arguments(settings, dtype)
        )
        model, info = loaded
        if vocab_size > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(vocab_size)
    check_complete(name, info)
    model.config.pad_token_id = pad_token_id
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    adapted = add_adapters(model, settings.lora, task="CAUSAL_LM", dropout=dropout)
    return CausalModel(adapted, vocab_size)
