"""How a rollout calls the model: our own forward for the families that it knows, else the model's.

Both answer `prefill` and `decode` alike; continuous.py does not know which one runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf.errors import ConfigError
from rlhf.rollout.attention import lean_attention
from rlhf.rollout.generation import base_model
from rlhf.rollout.lean import Layers, LeanForward
from rlhf.rollout.packing import packed_linears, weight_and_bias
from rlhf.rollout.slab import Slab


class Forward(Protocol):
    """What a rollout needs of a model."""

    def prefill(self, ids: Tensor, mask: Tensor) -> tuple[Layers, Tensor]: ...

    def decode(self, tokens: Tensor, positions: Tensor, slab: Slab) -> Tensor: ...


class ModuleForward:
    """The model's own forward, any transformers causal LM."""

    def __init__(self, model: Any) -> None:
        base = base_model(model)
        accepted = inspect.signature(base.forward).parameters
        self._model = model
        self._positions = "position_ids" in accepted
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def prefill(self, ids: Tensor, mask: Tensor) -> tuple[Layers, Tensor]:
        """See LeanForward.prefill; keys and values of pads may be anything."""
        cache = DynamicCache()  # without a config every layer is kept at full length
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        logits = self._logits(ids, mask, cache, positions)
        held: list[Any] = cache.layers
        return [(layer.keys, layer.values) for layer in held], logits

    def decode(self, tokens: Tensor, positions: Tensor, slab: Slab) -> Tensor:
        """See LeanForward.decode."""
        return self._logits(tokens[:, None], slab.mask, slab.cache, positions[:, None])

    def _logits(self, ids: Tensor, mask: Tensor, cache: Any, positions: Tensor) -> Tensor:
        options: dict[str, Any] = dict(self._options)
        if self._positions:
            options["position_ids"] = positions
        output = self._model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options
        )
        return output.logits[:, -1]

    def idle(self, device: torch.device) -> None:
        """The smallest forward, to take part in other ranks' parameter gathering."""
        self._model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)


@contextmanager
def forward_of(model: Any, *, lean: bool, whole: bool) -> Iterator[Forward]:
    """The fastest forward for a model whose weights do not change inside.

    Args:
        lean: False: the model's own forward and weights, nothing of ours but the attention.
        whole: the weights are all here; False under ZeRO-3 without gathering, where the model's
            own modules must run so that they can be gathered.

    Raises:
        ConfigError: the model keeps a recurrent state.
    """
    base = base_model(model)
    if getattr(base, "_is_stateful", False):
        raise ConfigError(
            f"{type(base).__name__} keeps a recurrent state, which the continuous rollout "
            "does not support: set rollout.engine to hybrid"
        )
    ours = LeanForward.of(model) if lean and whole else None
    if ours is not None:
        head = model.get_output_embeddings()
        plain = weight_and_bias(head) is not None  # `ours` has packed it
        with nullcontext() if plain else packed_linears(head):
            yield ours
        return
    with lean_attention(model):
        if lean and whole:
            with packed_linears(model):
                yield ModuleForward(model)
        else:
            yield ModuleForward(model)
