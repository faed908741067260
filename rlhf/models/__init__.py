"""Models: names, families, policy (causal) and scalar (reward, critic) models, adapters, saving."""

from rlhf.models.causal import CausalModel, load_causal
from rlhf.models.generation import sampling_settings
from rlhf.models.info import check_positions, describe
from rlhf.models.loading import choose_dtype
from rlhf.models.save import Snapshot, model_card
from rlhf.models.scalar import ScalarModel, last_tokens, last_values, load_scalar
from rlhf.models.shared import share, why_not_shared
from rlhf.models.spec import materialise
from rlhf.models.tokenizer import fingerprint, load_tokenizer

__all__ = [
    "CausalModel",
    "ScalarModel",
    "Snapshot",
    "check_positions",
    "choose_dtype",
    "describe",
    "fingerprint",
    "last_tokens",
    "last_values",
    "load_causal",
    "load_scalar",
    "load_tokenizer",
    "materialise",
    "model_card",
    "sampling_settings",
    "share",
    "why_not_shared",
]
