"""Work of decoder layers for the positions that count, and for no others.

The parts of a layer that treat each position by itself (feed-forward, attention's output) run over
chosen rows: the last layer's over the positions that somebody reads (answers; for the reward model
one position), the others' over real tokens where a batch has many pads. What the rest of the
hidden states holds is then nobody's business: no attention and no head reads it.

The modules' `forward` is replaced for the time of one forward. Gradient checkpointing runs layers
again later, when it is not: there, everything is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf.families import FAMILIES

ENOUGH = 0.9  # rows that are needed, of all: from here on choosing them costs more than it saves
FIRST_QUERY = "rlhf_first_query"  # of the last layer's attention: columns before it are not read


LAYERS = {family.layer_class: family.parts for family in FAMILIES.values() if family.parts}
"""Class of a layer in transformers -> its parts; layers of other classes compute everything."""


@contextmanager
def only_needed(decoder: Any, real: Tensor, read: Tensor | None) -> Iterator[None]:
    """Inside, the decoder's last hidden states are right where `read` says, anything elsewhere.

    Args:
        decoder: a transformers decoder without head.
        real: (B, T) bool, False on pads.
        read: (B, T) bool, part of `real`; None: all of `real`.
    """
    layers = _layers(decoder)
    known = layers and all(type(layer).__name__ in LAYERS for layer in layers)
    with ExitStack() as stack:
        if known and not runs_again(decoder):
            last = real if read is None else read
            rows = [_rows(real)] * (len(layers) - 1) + [_rows(last)]
            for layer, wanted in zip(layers, rows, strict=True):
                if wanted is not None:
                    stack.enter_context(_restricted(layer, wanted))
            if rows[-1] is not None:
                stack.enter_context(_queries_from(layers[-1], last))
        yield


def runs_again(decoder: Any) -> bool:
    """Gradient checkpointing: layers are computed once more in the backward pass."""
    # transformers renames the attribute: the old name goes in version 6.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return bool(decoder.training and any(getattr(decoder, name, False) for name in names))


def _layers(decoder: Any) -> list[Any]:
    inner = getattr(decoder, "decoder", decoder)  # OPT's
    return list(getattr(inner, "layers", None) or getattr(inner, "h", None) or ())


def _rows(wanted: Tensor) -> Tensor | None:
    """Indices of wanted positions in (B * T), or None where nearly all are wanted."""
    rows = wanted.flatten().nonzero().squeeze(1)
    return rows if len(rows) < ENOUGH * wanted.numel() else None


@contextmanager
def _restricted(layer: Any, rows: Tensor) -> Iterator[None]:
    """Inside, the layer's position-wise parts compute these rows alone."""
    parts = LAYERS[type(layer).__name__]
    out = getattr(getattr(layer, parts.attention), parts.out)
    enter, leave = getattr(layer, parts.enter), getattr(layer, parts.leave)
    places = Places(rows)
    replaced = {out: _both(out.forward, places)}
    if enter is leave:
        replaced[enter] = _both(enter.forward, places)
    else:
        replaced |= {enter: _first(enter.forward, places), leave: _last(leave.forward, places)}
    before = {module: vars(module).get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:  # somebody else's
                module.forward = forward


@contextmanager
def _queries_from(layer: Any, read: Tensor) -> Iterator[None]:
    """Inside, the layer's attention is told the first column that is read (attention.py)."""
    attention = getattr(layer, LAYERS[type(layer).__name__].attention)
    setattr(attention, FIRST_QUERY, int(read.any(dim=0).long().argmax()))
    try:
        yield
    finally:
        delattr(attention, FIRST_QUERY)


class Places:
    """Takes rows out of (..., K) and puts (n, K) back among zeros."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.shape = rows, torch.Size()

    def take(self, x: Tensor) -> Tensor:
        self.shape = x.shape[:-1]
        return x.reshape(-1, x.shape[-1]).index_select(0, self.rows)

    def put(self, part: Tensor) -> Tensor:
        whole = part.new_zeros(self.shape.numel(), part.shape[-1])
        return whole.index_copy(0, self.rows, part).view(*self.shape, -1)


Forward = Callable[[Tensor], Tensor]


def _both(forward: Forward, places: Places) -> Forward:
    return lambda x: places.put(forward(places.take(x)))


def _first(forward: Forward, places: Places) -> Forward:
    return lambda x: forward(places.take(x))


def _last(forward: Forward, places: Places) -> Forward:
    return lambda x: places.put(forward(x))
