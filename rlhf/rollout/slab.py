"""A preallocated key/value cache for a changing set of rows, usable as a transformers Cache.

All rows share one write column. A row's tokens lie in consecutive columns that end there, its
left padding before them is masked, so rows that joined at different times sit side by side: only
the masked prefix differs. Reads go from the first column that any live row needs. Layers are full
length; sliding windows come from the mask that transformers builds.

On CPU keys are stored with the columns last and shown as (slots, heads, columns, dim): the product
of a query with all keys reads memory in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

Pairs = Sequence[tuple[Tensor, Tensor]]  # keys and values (B, heads, T, dim) of each layer


@dataclass
class Span:
    """The live part: the first `rows` rows, columns `start` to `end` (exclusive)."""

    rows: int = 0
    start: int = 0
    end: int = 0


class SlabLayer(CacheLayerMixin):
    """One layer: `update` writes at the span's end and returns views, without a copy."""

    is_sliding = False

    def __init__(self, like: tuple[Tensor, Tensor], slots: int, columns: int, span: Span) -> None:
        super().__init__()
        # Zeros: a masked column is multiplied by weight 0, which a stray NaN would survive.
        keys, values = like
        if keys.device.type == "cpu":
            self._flat = _zeros(keys, slots, keys.shape[3], columns)
            held = self._flat.transpose(2, 3)
        else:
            held = _zeros(keys, slots, columns, keys.shape[3])
            self._flat = held.transpose(2, 3)
        self.held = (held, _zeros(values, slots, columns, values.shape[3]))
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

    def write(self, keys: Tensor, values: Tensor) -> None:
        """`update` without views: (rows, heads, dim) into the next column."""
        rows, end = self.span.rows, self.span.end
        self.held[0][:rows, :, end] = keys
        self.held[1][:rows, :, end] = values

    def flat(self) -> tuple[Tensor, Tensor]:
        """Live keys (rows * heads, dim, length) and values (rows * heads, length, dim), views,
        the column just written included."""
        rows, start, end = self.span.rows, self.span.start, self.span.end + 1
        keys, values = self._flat[:rows], self.held[1][:rows]
        return keys.flatten(0, 1)[:, :, start:end], values.flatten(0, 1)[:, start:end]

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

    def __init__(self, prefilled: Pairs, slots: int, columns: int) -> None:
        self.span = Span()
        self.layers = [SlabLayer(like, slots, columns, self.span) for like in prefilled]
        self.cache = Cache(layers=list(self.layers))
        device = self.layers[0].held[0].device
        self._column = torch.arange(columns, device=device)
        self._first = torch.zeros(slots, dtype=torch.long, device=device)
        self._visible = torch.zeros(slots, columns, dtype=torch.bool, device=device)
        self._even = False  # all live rows begin at the same column

    @property
    def mask(self) -> Tensor:
        """(rows, length + 1) bool for the next token: columns not yet written are visible in
        advance, so it need not grow."""
        return self._visible[: self.span.rows, self.span.start : self.span.end + 1]

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(rows, 1, length + 1) to add to scores: 0 where `mask` is True, -inf elsewhere; None
        where all is visible."""
        if self._even:
            return None
        mask = self.mask
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill_(~mask, float("-inf"))[:, None]

    def append(self, prefilled: Pairs, source: Tensor, lengths: Tensor) -> None:
        """Add len(source) rows: row i is a copy of row `source[i]` of a left-padded prefill,
        with `lengths[i]` real tokens. Prompts must not be longer than the live columns."""
        span, width = self.span, prefilled[0][0].shape[2]
        if span.rows == 0:
            span.start, span.end = 0, width
        old, new = span.rows, span.rows + len(source)
        for layer, filled in zip(self.layers, prefilled, strict=True):
            for held, given in zip(layer.held, filled, strict=True):
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
            first = self._first[: self.span.rows]
            self.span.start, last = (int(x) for x in first.aminmax())
            self._even = last == self.span.start


def _zeros(like: Tensor, slots: int, *size: int) -> Tensor:
    return like.new_zeros(slots, like.shape[1], *size)
