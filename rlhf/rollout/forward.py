"""How a rollout calls the model: our own forward for the families that it knows, else the model's.

Both answer `prefill` and `decode` alike; continuous.py does not know which one runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf.engine.zero3 import is_sharded
from rlhf.rollout.attention import lean_attention
from rlhf.rollout.generation import base_model
from rlhf.rollout.graphs import GraphForward
from rlhf.rollout.lean import Layers, LeanForward
from rlhf.rollout.packing import packed_linears, weight_and_bias
from rlhf.rollout.probe import Forward, Way, choose_way
from rlhf.rollout.slab import Slab


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


class RereadForward(ModuleForward):
    """The model's own forward over the whole row for every token: for any family, and slow.

    The slab holds the rows' ids instead of keys: one layer, one head of size 1.
    """

    def prefill(self, ids: Tensor, mask: Tensor) -> tuple[Layers, Tensor]:
        """See LeanForward.prefill."""
        held = ids[:, None, :, None]
        return [(held, held)], self._reread(ids, mask)

    def decode(self, tokens: Tensor, positions: Tensor, slab: Slab) -> Tensor:
        """See LeanForward.decode."""
        held = tokens[:, None, None]
        rows, _ = slab.layers[0].update(held[:, :, None], held[:, :, None])
        return self._reread(rows[:, 0, :, 0], slab.mask)

    def _reread(self, ids: Tensor, mask: Tensor) -> Tensor:
        options: dict[str, Any] = dict(self._options)
        if self._positions:
            options["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        output = self._model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **options)
        return output.logits[:, -1]


@contextmanager
def forward_of(model: Any, *, lean: bool, whole: bool, graphs: bool = True) -> Iterator[Forward]:
    """The fastest forward for a model whose weights do not change inside, of those that are right:
    each is tried on a few tokens before it is used (probe.py).

    Args:
        lean: False: the model's own forward and weights, nothing of ours but the attention.
        whole: the weights are all here; False under ZeRO-3 without gathering, where the model's
            own modules must run so that they can be gathered.
        graphs: on a GPU, steps of our own forward as CUDA graphs (graphs.py).

    Raises:
        ConfigError: no way to run this family over left-padded rows gives its own numbers.
    """
    ways: dict[str, Way] = {}
    if lean and whole:
        # Not below ZeRO-3's hooks, which wait for streams of their own.
        on_gpu = next(model.parameters()).device.type == "cuda"
        if graphs and on_gpu and not is_sharded(model.parameters()):
            ways["packed, its steps recorded"] = _packed_way(graphs=True)
        ways["packed"] = _packed_way(graphs=False)
    if not getattr(base_model(model), "_is_stateful", False):
        ways |= {"cached": _cached_way(lean and whole, ours=True)}
        ways |= {"cached by its own attention": _cached_way(lean and whole, ours=False)}
    ways["read again for every token"] = _reread_way
    with choose_way(model, ways)(model) as forward:
        assert forward is not None
        yield forward


def _packed_way(*, graphs: bool) -> Way:
    @contextmanager
    def way(model: Any) -> Iterator[Forward | None]:
        ours = LeanForward.of(model)
        if ours is None:
            yield None
            return
        head = model.get_output_embeddings()
        plain = weight_and_bias(head) is not None  # `ours` has packed it
        with nullcontext() if plain else packed_linears(head):
            yield GraphForward(ours) if graphs else ours

    return way


def _cached_way(packed: bool, *, ours: bool) -> Way:
    @contextmanager
    def way(model: Any) -> Iterator[Forward | None]:
        attention = lean_attention(model) if ours else nullcontext()
        with attention, packed_linears(model) if packed else nullcontext():
            yield ModuleForward(model)

    return way


@contextmanager
def _reread_way(model: Any) -> Iterator[Forward | None]:
    yield RereadForward(model)
