"""Tiny random models, prompts and tokenizers for the rollout tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.rollout import RolloutRequest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PAD, EOS, VOCAB = 0, 1, 64
IDS = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)

_COMMON = {"vocab_size": VOCAB, "pad_token_id": PAD, "tie_word_embeddings": False}
_ROPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "llama": _ROPE,
    "qwen2": {k: v for k, v in _ROPE.items() if k != "head_dim"},
    "mistral": _ROPE | {"sliding_window": None},
    "qwen3": _ROPE,
    "gemma2": _ROPE | _WINDOW,
    "gemma3_text": _ROPE | _WINDOW,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "phi": {k: v for k, v in _ROPE.items() if k != "head_dim"},
}


def tiny_model(family: str = "llama", seed: int = 0) -> Any:
    """A random model whose greedy answers vary: untied, with large weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **_COMMON, **FAMILIES[family])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.35)
    model.generation_config.eos_token_id = None
    return model.eval()


class Wrapper(nn.Module):
    """Like the project's model wrappers: `.model`, `.config`, `.generate`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)


def engine_of(model: Any) -> SimpleNamespace:
    return SimpleNamespace(module=Wrapper(model))


def prompts(*lengths: int, seed: int = 0) -> RolloutRequest:
    """Left-padded random prompts of these lengths, without special tokens."""
    source = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(2, VOCAB, (length,), generator=source)
        mask[row, width - length :] = 1
    return RolloutRequest(ids, mask)


def hf_greedy(model: Any, request: RolloutRequest, limit: int, eos: int | None) -> torch.Tensor:
    """What model.generate answers, (N, A), pad after EOS."""
    output = model.generate(
        request.prompt_ids,
        attention_mask=request.prompt_attention_mask,
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=PAD,
    )
    return output[:, request.prompt_ids.shape[1] :]


def spread_eos(answers: torch.Tensor) -> int:
    """The token whose first occurrences in answers (N, A) differ most between rows."""

    def first(row: torch.Tensor, token: int) -> int:
        hits = (row == token).nonzero()
        return int(hits[0]) if len(hits) else answers.shape[1]

    def variety(token: int) -> int:
        return len({first(row, token) for row in answers})

    return max(range(2, VOCAB), key=variety)


def char_tokenizer() -> PreTrainedTokenizerFast:
    """64 ids: pad, EOS, then one character each from 'a' on, joined without spaces."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS} | {chr(95 + i): i for i in range(2, VOCAB)}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def fresh_log_probs(model: Any, generation: Any, temperature: float) -> torch.Tensor:
    """(B, A) log-probs of the answers by one plain forward over prompt + answer."""
    mask = generation.attention_mask
    with torch.no_grad():
        logits = model(
            input_ids=generation.input_ids,
            attention_mask=mask,
            **({} if model.config.model_type == "bloom" else {"position_ids": positions(mask)}),
        ).logits.float()
    width = generation.answer_mask.shape[1]
    log_probs = (logits[:, -width - 1 : -1] / temperature).log_softmax(-1)
    return log_probs.gather(2, generation.answers[:, :, None]).squeeze(2)


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)
