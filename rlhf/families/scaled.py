"""Families of which only this is special here: what becomes of their output head's product.

Everything else about them is found out when they are loaded, or left to their own forward. A family
of which more is known has a file of its own.
"""

from __future__ import annotations

from rlhf.families.family import Family, LogitScale

_CAP = LogitScale("cap", "final_logit_softcapping")
_DIVIDE = LogitScale("divide", "logits_scaling")
_MULTIPLY = LogitScale("multiply", "logit_scale")

_LOGITS = {
    "gemma3_text": _CAP,
    "gemma3": _CAP,
    "gemma3n_text": _CAP,
    "gemma3n": _CAP,
    "gemma4_text": _CAP,
    "gemma4": _CAP,
    "vaultgemma": _CAP,
    "nanochat": _CAP,
    "recurrent_gemma": LogitScale("cap", "logits_soft_cap"),
    "xlstm": LogitScale("cap", "output_logit_soft_cap"),
    "cohere": _MULTIPLY,
    "cohere2": _MULTIPLY,
    "cohere2_moe": _MULTIPLY,
    "falcon_h1": LogitScale("multiply", "lm_head_multiplier"),
    "hyperclovax": LogitScale("multiply", "logits_scaling"),
    "granite": _DIVIDE,
    "granite_swa": _DIVIDE,
    "granitemoe": _DIVIDE,
    "granitemoe_swa": _DIVIDE,
    "granitemoeshared": _DIVIDE,
    "granitemoehybrid": _DIVIDE,
    "minicpm3": _DIVIDE,  # it divides the hidden states; its head has no bias
}

FAMILIES = tuple(Family(name, logits=scale) for name, scale in _LOGITS.items())
