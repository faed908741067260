"""How a published model generates: generation_config.json, from the rollout's settings."""

from __future__ import annotations

from typing import Any

from rlhf.config.schema import RolloutConfig


def sampling_settings(rollout: RolloutConfig) -> dict[str, Any]:
    """What makes `model.generate()` sample as the rollout does, for transformers' GenerationConfig.

    Training samples among all tokens (14). That is written, since transformers' own default is
    top_k 50. With `stop_strings` transformers
    needs the tokenizer: `model.generate(..., tokenizer=tokenizer)`.
    """
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": rollout.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": rollout.max_new_tokens,
    }
    return settings | ({"stop_strings": list(rollout.stop)} if rollout.stop else {})


def end_ids(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's eos, then what else the model's own generation config
    calls so (Llama 3: <|end_of_text|>, <|eom_id|>).

    Only special tokens of the tokenizer count, and not pad: a default left in a config is no end.
    """
    eos = int(tokenizer.eos_token_id)
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = listed if isinstance(listed, list | tuple) else [listed]
    others = sorted({int(i) for i in listed if i is not None} - {eos, tokenizer.pad_token_id})
    if not others:
        return (eos,)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return (eos, *(i for i in others if i in added and added[i].special))


def without_text(model: Any, vocab_size: int | None) -> list[int] | None:
    """Ids of the model that the tokenizer has no token for; None where there is none."""
    rows = model.config.get_text_config().vocab_size
    return list(range(vocab_size, rows)) if vocab_size and vocab_size < rows else None


def generation_settings(
    tokenizer: Any, model: Any, sampling: dict[str, Any] | None = None
) -> dict[str, Any]:
    """All of generation_config.json: how answers end, what is never sampled, and `sampling`."""
    ends = end_ids(tokenizer, model)
    settings = {
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    never = without_text(model, len(tokenizer))
    return settings | ({"suppress_tokens": never} if never else {}) | (sampling or {})
