"""Where model families differ. One table; an entry says only what is unlike the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from rlhf.errors import RequirementError

LogitTransform = Callable[[torch.Tensor], torch.Tensor]


def _soft_cap(config: Any) -> LogitTransform | None:
    cap = getattr(config, "final_logit_softcapping", None)
    return (lambda logits: torch.tanh(logits / cap) * cap) if cap else None


def _multiply(name: str) -> Callable[[Any], LogitTransform | None]:
    return lambda config: lambda logits: logits * getattr(config, name)


def _divide(name: str) -> Callable[[Any], LogitTransform | None]:
    return lambda config: lambda logits: logits / getattr(config, name)


# model_type -> what the family does to the output head's logits (its modeling file in transformers)
LOGIT_TRANSFORMS: dict[str, Callable[[Any], LogitTransform | None]] = {
    "gemma2": _soft_cap,
    "gemma3_text": _soft_cap,
    "gemma3": _soft_cap,
    "cohere": _multiply("logit_scale"),
    "cohere2": _multiply("logit_scale"),
    "granite": _divide("logits_scaling"),
    "granitemoe": _divide("logits_scaling"),
}


def logit_transform(config: Any) -> LogitTransform | None:
    """What turns this family's head output into logits; None: nothing."""
    build = LOGIT_TRANSFORMS.get(config.model_type)
    return build(config) if build else None


def takes_position_ids(backbone: torch.nn.Module) -> bool:
    """False for families without position ids (BLOOM's ALiBi reads the mask)."""
    return "position_ids" in inspect.signature(backbone.forward).parameters


def scalar_head(model: torch.nn.Module) -> torch.nn.Linear:
    """The `Linear(hidden, 1)` of a ForSequenceClassification model.

    Raises:
        RequirementError: the family keeps its head elsewhere.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise RequirementError(
            f"{type(model).__name__} has no `score` head, so it cannot be a reward model here: "
            "use a decoder family (Llama, OPT, GPT-2, GPT-NeoX, Qwen, Gemma, BLOOM, Mistral ...)."
        )
    return head


def no_dropout(config: Any) -> None:
    """Sets every dropout of a model's config to 0 (ALGORITHM.md 18)."""
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("drop" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
