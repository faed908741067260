"""Which way to run a model in a rollout: the fastest that gives the model's own numbers.

Each way answers two short prompts of different lengths and one token more; each row's logits must
be those of the model's own eager forward over that row alone. This finds caches that cannot be cut
into rows (LFM2, MiniMax), attention that depends on its name (Falcon), and families that do not
mind pads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.models.attention import attention_named
from rlhf.models.families import takes_position_ids
from rlhf.models.trusted import probe_ids, quiet, say
from rlhf.rollout.generation import base_model
from rlhf.rollout.lean import Layers
from rlhf.rollout.slab import Slab


class Forward(Protocol):
    """What a rollout needs of a model."""

    def prefill(self, ids: Tensor, mask: Tensor) -> tuple[Layers, Tensor]: ...

    def decode(self, tokens: Tensor, positions: Tensor, slab: Slab) -> Tensor: ...


Way = Callable[[Any], AbstractContextManager[Forward | None]]
_PROMPT, _PADS = 8, 3
# Share of the logits' norm. Half precision may send a token to another expert.
_ALLOWED, _ALLOWED_IN_HALF, _TINY = 1e-3, 0.1, 1e-6
_OVER_A_STRANGE_CACHE: tuple[type[Exception], ...] = (
    *(RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError),
)
_chosen: WeakKeyDictionary[Any, dict[tuple[Any, ...], str]] = WeakKeyDictionary()


def choose_way(model: Any, ways: dict[str, Way]) -> Way:
    """The first of `ways` that is right for this model, remembered. Ways that do not
    know the model (None) are passed over.

    Raises:
        ConfigError: none is.
    """
    base, dtype = base_model(model), next(model.parameters()).dtype
    key, known = (type(model), dtype, *ways), _chosen.setdefault(base, {})
    if key in known:
        return ways[known[key]]
    with quiet(model):
        ids = probe_ids(base, _PROMPT + 1)
        with attention_named(model, "eager"):
            wanted = _alone(model, ids)
        if not bool(torch.isfinite(wanted).all()):
            return ways[next(reversed(ways))]  # diverged weights prove nothing: the rollout says so
        first = None
        for name, way in ways.items():
            with way(model) as forward:
                if forward is None:
                    continue
                first = first or name
                if not _right(forward, ids, wanted, dtype):
                    continue
            known[key] = name
            if name != first:
                say(f"{type(base).__name__}: answers are {name}, as faster ways do not fit it")
            return way
    raise ConfigError(f"{type(base).__name__}: {_why_none(model, ids)}: use another model")


def _why_none(model: Any, ids: Tensor) -> str:
    """Of a model that no way fits: does it read later tokens (XLM as a masked LM), or pads?"""
    later = ids.clone()
    later[:, -1] = (later[:, -1] + 1) % (int(ids.max()) + 1)
    with quiet(model), attention_named(model, "eager"):
        before, changed = _alone(model, ids)[:, 0], _alone(model, later)[:, 0]
    if (changed - before).norm() > _ALLOWED * before.norm():
        return (
            "a token's prediction changes with the tokens after it (it is no causal language "
            "model, or its configuration does not say that it is), so it cannot write answers"
        )
    return (
        "over left-padded rows its forward does not give the numbers that it gives without pads, "
        "so step 3 cannot sample from it or score it"
    )


def _alone(model: Any, ids: Tensor) -> Tensor:
    """(2, 2, V) logits after each row's prompt and after one token more; no pads, no cache."""
    found = []
    for row, pads in zip(ids, (_PADS, 0), strict=True):
        one = row[None, pads:]
        extra = {}
        if takes_position_ids(base_model(model)):
            extra["position_ids"] = torch.arange(one.shape[1], device=one.device)[None]
        found.append(model(input_ids=one, use_cache=False, **extra).logits[0, -2:].float())
    return torch.stack(found)


def _right(forward: Forward, ids: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    prompts = ids[:, :-1]
    mask = torch.ones_like(prompts, dtype=torch.bool)
    mask[0, :_PADS] = False
    lengths = mask.sum(dim=1)
    try:
        layers, after_prompt = forward.prefill(prompts, mask)
        slab = Slab(layers, len(ids))
        slab.append(layers, torch.arange(len(ids), device=ids.device), lengths)
        slab.make_room()
        after_token = forward.decode(ids[:, -1], lengths, slab)
    except _OVER_A_STRANGE_CACHE:
        return False
    found = torch.stack([after_prompt, after_token], dim=1).float()
    allowed = _ALLOWED if dtype == torch.float32 else _ALLOWED_IN_HALF
    spread = (wanted - wanted.mean(-1, keepdim=True)).norm()  # 0: a head of zeros
    return bool((found - wanted).norm() <= allowed * spread + _TINY * wanted.numel() ** 0.5)
