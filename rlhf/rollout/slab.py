"""A preallocated key/value cache for a changing set of rows, usable as a transformers Cache.

All rows share one write column. A row's tokens lie in consecutive columns that end there, its
left padding before them is masked, so rows that joined at different times sit side by side: only
the masked prefix differs. Reads go from the first column that any live row needs. Layers are full
length; sliding windows come from the mask that transformers builds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


@dataclass
class Span:
    """The live part: the first `rows` rows, columns `start` to `end` (exclusive)."""

    rows: int = 0
    start: int = 0
    end: int = 0


class SlabLayer(CacheLayerMixin):
    """One layer: `update` writes at the span's end and returns views, without a copy."""

    is_sliding = False

    def __init__(self, like: Any, slots: int, columns: int, span: Span) -> None:
        super().__init__()
        # Zeros: a masked column is multiplied by weight 0, which a stray NaN would survive.
        self.held = tuple(_zeros(given, slots, columns) for given in _pair(like))
        self.keys, self.values = self.held
        self.span = span
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the slab is allocated at construction."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, 1, dim) states; return everything (rows, heads, length, dim)."""
        rows, start, end = self.span.rows, self.span.start, self.span.end
        keys, values = self.held
        keys[:rows, :, end] = key_states.squeeze(2)
        values[:rows, :, end] = value_states.squeeze(2)
        return keys[:rows, :, start : end + 1], values[:rows, :, start : end + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of what `update` will return."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns already held."""
        return self.span.end - self.span.start

    def get_max_length(self) -> int:
        """Columns allocated."""
        return self.held[0].shape[2]


class Slab:
    """The cache of all layers with its mask; `slots` rows of `columns` columns."""

    def __init__(self, prefilled: DynamicCache, slots: int, columns: int) -> None:
        self.span = Span()
        self.layers = [SlabLayer(like, slots, columns, self.span) for like in prefilled.layers]
        self.cache = Cache(layers=list(self.layers))
        device = self.layers[0].held[0].device
        self._column = torch.arange(columns, device=device)
        self._first = torch.zeros(slots, dtype=torch.long, device=device)
        self._visible = torch.zeros(slots, columns, dtype=torch.bool, device=device)

    @property
    def mask(self) -> Tensor:
        """(rows, length + 1) bool for the next token: columns not yet written are visible in
        advance, so it need not grow."""
        return self._visible[: self.span.rows, self.span.start : self.span.end + 1]

    def append(self, prefilled: DynamicCache, source: Tensor, lengths: Tensor) -> None:
        """Add len(source) rows: row i is a copy of row `source[i]` of a left-padded prefill,
        with `lengths[i]` real tokens. Prompts must not be longer than the live columns."""
        span, width = self.span, prefilled.get_seq_length()
        if span.rows == 0:
            span.start, span.end = 0, width
        old, new = span.rows, span.rows + len(source)
        for layer, filled in zip(self.layers, prefilled.layers, strict=True):
            for held, given in zip(layer.held, _pair(filled), strict=True):
                held[old:new, :, span.end - width : span.end] = given[source]
        self._first[old:new] = span.end - lengths
        self._visible[old:new] = self._column >= self._first[old:new, None]
        span.rows = new
        self._trim()

    def step(self) -> None:
        """Count the column that a forward has just written."""
        self.span.end += 1

    def make_room(self) -> None:
        """Ensure a free column: when the last is used, move the live columns to the left."""
        span = self.span
        if span.end < len(self._column):
            return
        rows, width = span.rows, span.end - span.start
        for layer in self.layers:
            for held in layer.held:
                held[:rows, :, :width] = held[:rows, :, span.start : span.end].clone()
        self._first[:rows] -= span.start
        self._visible[:rows] = self._column >= self._first[:rows, None]
        span.start, span.end = 0, width

    def retire(self, holes: Tensor, movers: Tensor, remaining: int) -> None:
        """Keep `remaining` rows: copy the rows `movers` into the rows `holes`, drop the tail."""
        span = self.span
        if len(holes):
            for layer in self.layers:
                for held in layer.held:
                    live = held[:, :, span.start : span.end]
                    live[holes] = live[movers]
            self._first[holes] = self._first[movers]
            self._visible[holes] = self._visible[movers]
        span.rows = remaining
        self._trim()

    def _trim(self) -> None:
        if self.span.rows:
            self.span.start = int(self._first[: self.span.rows].min())


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _zeros(like: Tensor, slots: int, columns: int) -> Tensor:
    return like.new_zeros(slots, like.shape[1], columns, like.shape[3])
