"""What a loaded model is, in a line, and whether it can hold the lengths asked for."""

from __future__ import annotations

from typing import Any

from rlhf.engine.zero3 import full_size
from rlhf.errors import ConfigError
from rlhf.models.adapters import plain


def describe(module: Any, dtype: str) -> str:
    """One line: class, parameters, how many of them train, dtype."""
    parameters = list(module.parameters())
    total = sum(full_size(p) for p in parameters)
    trained = sum(full_size(p) for p in parameters if p.requires_grad)
    name = type(plain(module.model)).__name__
    return f"{name}: {total:,} parameters, {trained:,} trained ({trained / total:.1%}), {dtype}"


def check_positions(module: Any, length: int) -> None:
    """Raises ConfigError when rows may be longer than the model's position table."""
    limit = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise ConfigError(
            f"rows of up to {length} tokens do not fit the model's {limit} positions: lower "
            "max_length (steps 1 and 2) or rollout.max_prompt_length + max_new_tokens (step 3)."
        )
