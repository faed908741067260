"""A key/value cache for a changing set of rows, usable as a transformers Cache.

All rows share one write column. A row's tokens lie in consecutive columns that end there, its
left padding before them is masked, so rows that joined at different times sit side by side: only
the masked prefix differs. Layers are full length; sliding windows come from the mask that
transformers builds.

Columns are added some at a time, and those that no live row needs are dropped then: the cache is
moved once in so many steps, and stays dense. On CPU that matters: products of batches in half
precision copy an operand that is a slice of a longer one, and each new length is another product to
compile (oneDNN: 0.5 MB a shape): there attention reads all allocated columns, hidden ones masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Columns allocated ahead. A GPU records its steps anew when the cache moves (graphs.py).
GROW, GROW_ON_GPU = 32, 128
Pairs = Sequence[tuple[Tensor, Tensor]]  # keys and values (B, heads, T, dim) of each layer


@dataclass
class Span:
    """The live part: the first `rows` rows, columns `start` to `end` (exclusive)."""

    rows: int = 0
    start: int = 0
    end: int = 0
    dense: bool = False  # reads take in all columns that are allocated

    def read(self) -> slice:
        """The columns that attention reads after a write."""
        return slice(None) if self.dense else slice(self.start, self.end + 1)

    @property
    def written(self) -> int:
        """Columns before the next one, counted from the first that is read."""
        return self.end if self.dense else self.end - self.start


class SlabLayer(CacheLayerMixin):
    """One layer: `update` writes at the span's end and returns views, without a copy."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, pair: tuple[Tensor, Tensor], slots: int, columns: int, span: Span) -> None:
        super().__init__()
        # Zeros: a masked column is multiplied by weight 0, which a stray NaN would survive.
        self.keys, self.values = (
            given.new_zeros(slots, given.shape[1], columns, given.shape[3]) for given in pair
        )
        self.span = span
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the slab is allocated at construction."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, 1, dim) states; return what `Slab.mask` describes (rows, heads,
        columns, dim)."""
        self.write(key_states.squeeze(2), value_states.squeeze(2))
        rows, columns = self.span.rows, self.span.read()
        return self.keys[:rows, :, columns], self.values[:rows, :, columns]

    def write(self, keys: Tensor, values: Tensor) -> None:
        """(rows, heads, dim) into the next column."""
        rows, end = self.span.rows, self.span.end
        self.keys[:rows, :, end] = keys
        self.values[:rows, :, end] = values

    def flat(self) -> tuple[Tensor, Tensor]:
        """Keys and values (rows * heads, columns, dim), views of what `Slab.bias` describes."""
        rows, columns = self.span.rows, self.span.read()
        keys, values = self.keys[:rows].flatten(0, 1), self.values[:rows].flatten(0, 1)
        return keys[:, columns], values[:, columns]

    def resize(self, slots: int, columns: int) -> None:
        """The live part moves to the left of new tensors."""
        self.keys = self._moved(self.keys, slots, columns)
        self.values = self._moved(self.values, slots, columns)

    def _moved(self, old: Tensor, slots: int, columns: int) -> Tensor:
        rows, start, end = self.span.rows, self.span.start, self.span.end
        new = old.new_zeros(slots, old.shape[1], columns, old.shape[3])
        new[:rows, :, : end - start] = old[:rows, :, start:end]
        return new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of what `update` will return."""
        length = self.get_max_length() if self.span.dense else self.span.written + query_length
        return length, 0

    def get_seq_length(self) -> int:
        """Where the next column is, among those that `update` returns."""
        return self.span.written

    def get_max_length(self) -> int:
        """Columns allocated."""
        return self.keys.shape[2]


class Slab:
    """The cache of all layers with its mask, for at most `slots` rows."""

    def __init__(self, prefilled: Pairs, slots: int) -> None:
        keys = prefilled[0][0]
        half = keys.dtype in (torch.bfloat16, torch.float16)
        self.span = Span(dense=half and keys.device.type == "cpu")
        self._slots = slots
        self._grow = GROW_ON_GPU if keys.device.type == "cuda" else GROW
        columns = keys.shape[2] + self._grow
        self.layers = [SlabLayer(pair, slots, columns, self.span) for pair in prefilled]
        self.cache = Cache(layers=list(self.layers))
        self._first = torch.zeros(slots, dtype=torch.long, device=keys.device)
        self._even = False  # all live rows begin at the same column
        self._see(columns)

    @property
    def mask(self) -> Tensor:
        """(rows, columns) bool for the next token over what `SlabLayer.update` returns."""
        span = self.span
        visible = self._visible[: span.rows, span.read()]
        return visible & (self._column <= span.end) if span.dense else visible

    def seen(self, rows: int) -> tuple[Tensor, Tensor]:
        """(rows, columns) bool, which of all allocated columns the first rows see, those to come
        included; and the columns' numbers. They are the slab's own until it moves."""
        return self._visible[:rows], self._column

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(rows, 1, columns) to add to the next token's scores over `SlabLayer.flat`: 0 where
        visible, -inf elsewhere; None where all is visible."""
        span = self.span
        if self._even and not span.dense:
            return None
        visible = self.mask
        zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return zeros.masked_fill_(~visible, float("-inf"))[:, None]

    def append(self, prefilled: Pairs, source: Tensor, lengths: Tensor) -> None:
        """Add len(source) rows: row i is a copy of row `source[i]` of a left-padded prefill,
        with `lengths[i]` real tokens. Prompts must not be longer than the live columns."""
        span, width = self.span, prefilled[0][0].shape[2]
        if span.rows == 0:
            span.start, span.end = 0, width
        old, new = span.rows, span.rows + len(source)
        for layer, (keys, values) in zip(self.layers, prefilled, strict=True):
            layer.keys[old:new, :, span.end - width : span.end] = keys[source]
            layer.values[old:new, :, span.end - width : span.end] = values[source]
        self._first[old:new] = span.end - lengths
        self._visible[old:new] = self._column >= self._first[old:new, None]
        span.rows = new
        self._trim()

    def step(self) -> None:
        """Count the column that a forward has just written."""
        self.span.end += 1

    def make_room(self) -> None:
        """Ensure a free column."""
        span = self.span
        if span.end == len(self._column) or span.start > self._grow:
            self._resize(span.end - span.start + self._grow)

    def retire(self, holes: Tensor, movers: Tensor, remaining: int) -> None:
        """Keep `remaining` rows: copy the rows `movers` into the rows `holes`, drop the tail."""
        span = self.span
        if len(holes):
            for layer in self.layers:
                for held in (layer.keys, layer.values):
                    live = held[:, :, span.start : span.end]
                    live[holes] = live[movers]
            self._first[holes] = self._first[movers]
            self._visible[holes] = self._visible[movers]
        span.rows = remaining
        self._trim()

    def _resize(self, columns: int) -> None:
        span = self.span
        for layer in self.layers:
            layer.resize(self._slots, columns)
        self._first -= span.start
        span.start, span.end = 0, span.end - span.start
        self._see(columns)

    def _see(self, columns: int) -> None:
        self._column = torch.arange(columns, device=self._first.device)
        self._visible = self._column >= self._first[:, None]

    def _trim(self) -> None:
        if self.span.rows:
            first = self._first[: self.span.rows]
            self.span.start, last = (int(x) for x in first.aminmax())
            self._even = last == self.span.start
