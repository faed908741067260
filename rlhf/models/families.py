"""Where model families differ. One table; an entry says only what is unlike the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from rlhf.errors import RequirementError

LogitTransform = Callable[[torch.Tensor], torch.Tensor]


def _soft_cap(name: str) -> Callable[[Any], LogitTransform | None]:
    def build(config: Any) -> LogitTransform | None:
        cap = getattr(config, name, None)
        return (lambda logits: torch.tanh(logits / cap) * cap) if cap else None

    return build


def _multiply(name: str) -> Callable[[Any], LogitTransform | None]:
    return lambda config: lambda logits: logits * getattr(config, name)


def _divide(name: str) -> Callable[[Any], LogitTransform | None]:
    return lambda config: lambda logits: logits / getattr(config, name)


_CAP = _soft_cap("final_logit_softcapping")


# model_type -> what the family does to the output head's logits (its modeling file in transformers)
LOGIT_TRANSFORMS: dict[str, Callable[[Any], LogitTransform | None]] = {
    "gemma2": _CAP,
    "gemma3_text": _CAP,
    "gemma3": _CAP,
    "gemma3n_text": _CAP,
    "gemma3n": _CAP,
    "gemma4_text": _CAP,
    "gemma4": _CAP,
    "vaultgemma": _CAP,
    "nanochat": _CAP,
    "recurrent_gemma": _soft_cap("logits_soft_cap"),
    "xlstm": _soft_cap("output_logit_soft_cap"),
    "cohere": _multiply("logit_scale"),
    "cohere2": _multiply("logit_scale"),
    "cohere2_moe": _multiply("logit_scale"),
    "falcon_h1": _multiply("lm_head_multiplier"),
    "hyperclovax": _multiply("logits_scaling"),
    "granite": _divide("logits_scaling"),
    "granite_swa": _divide("logits_scaling"),
    "granitemoe": _divide("logits_scaling"),
    "granitemoe_swa": _divide("logits_scaling"),
    "granitemoeshared": _divide("logits_scaling"),
    "granitemoehybrid": _divide("logits_scaling"),
    "minicpm3": _divide("logits_scaling"),  # it divides the hidden states; its head has no bias
}


def logit_transform(config: Any) -> LogitTransform | None:
    """What turns this family's head output into logits; None: nothing."""
    build = LOGIT_TRANSFORMS.get(config.model_type)
    return build(config.get_text_config()) if build else None


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
