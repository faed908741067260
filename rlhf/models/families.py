"""What is asked of a loaded model, whatever its family."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from rlhf.errors import RequirementError
from rlhf.families import FAMILIES

LogitTransform = Callable[[torch.Tensor], torch.Tensor]


def logit_transform(config: Any) -> LogitTransform | None:
    """What turns this family's head output into logits; None: nothing."""
    family = FAMILIES.get(config.model_type)
    if family is None or family.logits is None:
        return None
    value: Any = getattr(config.get_text_config(), family.logits.name, None)
    kind = family.logits.kind
    if kind == "cap":
        return (lambda logits: torch.tanh(logits / value) * value) if value else None
    return (lambda logits: logits * value) if kind == "multiply" else lambda logits: logits / value


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
