"""Decode steps on a GPU as CUDA graphs: a step's kernels are started by one call, not by hundreds.

A step of a small model is some thousand kernels of a few microseconds each, and Python starts them
more slowly than the GPU runs them. A graph is recorded once and replayed: it needs the same
addresses and shapes each time. So a step reads every column that the slab has allocated, hidden
ones masked, writes to the column that a tensor names, and takes in up to four times as many rows as
are alive; what the spare rows compute is not looked at. When the slab moves, or rows have become
few, another graph takes its place.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.rollout.lean import Layers, LeanForward
from rlhf.rollout.slab import Slab, SlabLayer

_FEWER = 4  # a graph serves until fewer than a quarter of its rows are alive


class FixedLayer:
    """A layer of the slab with fixed shapes: the first `rows` rows, all columns."""

    def __init__(self, layer: SlabLayer, rows: int, column: Tensor) -> None:
        self._keys, self._values, self._column = layer.keys[:rows], layer.values[:rows], column

    def write(self, keys: Tensor, values: Tensor) -> None:
        """(rows, heads, dim) into the column that the tensor names."""
        self._keys.index_copy_(2, self._column, keys[:, :, None])
        self._values.index_copy_(2, self._column, values[:, :, None])

    def flat(self) -> tuple[Tensor, Tensor]:
        """Keys and values (rows * heads, columns, dim)."""
        return self._keys.flatten(0, 1), self._values.flatten(0, 1)


class FixedSlab:
    """What `LeanForward.decode` asks of a slab, with fixed shapes; column (1,) int64.

    All its tensors are the slab's own or the caller's: a graph keeps nothing alive that it reads.
    """

    def __init__(self, slab: Slab, rows: int, column: Tensor) -> None:
        self.layers = [FixedLayer(layer, rows, column) for layer in slab.layers]
        (self._visible, self._numbers), self._column = slab.seen(rows), column

    def bias(self, dtype: torch.dtype) -> Tensor:
        """(rows, 1, columns): 0 where visible, -inf elsewhere. A spare row sees its own column."""
        visible = self._visible & (self._numbers <= self._column)
        zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return zeros.masked_fill_(~visible, float("-inf"))[:, None]


@dataclass
class Step:
    """One recorded step: what is copied into `tokens`, `positions` and `column` decides it."""

    slab: Slab
    keys: Tensor  # of the slab's first layer: another tensor, and the slab has moved
    rows: int
    tokens: Tensor
    positions: Tensor
    column: Tensor
    logits: Tensor
    replay: Callable[[], Any]

    def serves(self, slab: Slab, rows: int) -> bool:
        same = self.slab is slab and self.keys is slab.layers[0].keys
        return same and self.rows >= rows > self.rows // _FEWER


class GraphForward:
    """LeanForward with its decode steps recorded.

    Args:
        capture: False: run the same step anew each time, as on a CPU in the tests.
    """

    def __init__(self, lean: LeanForward, *, capture: bool = True) -> None:
        self._lean, self._capture = lean, capture
        self._step: Step | None = None

    def prefill(self, ids: Tensor, mask: Tensor) -> tuple[Layers, Tensor]:
        """See LeanForward.prefill."""
        return self._lean.prefill(ids, mask)

    def decode(self, tokens: Tensor, positions: Tensor, slab: Slab) -> Tensor:
        """See LeanForward.decode. The logits are valid until the next call."""
        rows = len(tokens)
        if self._step is None or not self._step.serves(slab, rows):
            self._step = None  # its memory is free for the next one
            self._step = self._record(tokens, positions, slab)
        step = self._step
        step.tokens[:rows].copy_(tokens)
        step.positions[:rows].copy_(positions)
        step.column.fill_(slab.span.end)
        step.replay()
        return step.logits[:rows]

    def _record(self, tokens: Tensor, positions: Tensor, slab: Slab) -> Step:
        keys = slab.layers[0].keys
        rows = len(keys)
        while rows // _FEWER >= len(tokens):
            rows //= _FEWER
        held, at = tokens.new_zeros(rows), positions.new_zeros(rows)
        held[: len(tokens)], at[: len(tokens)] = tokens, positions
        column = tokens.new_full((1,), slab.span.end)
        view: Any = FixedSlab(slab, rows, column)

        def act() -> Tensor:
            return self._lean.decode(held, at, view)

        if not self._capture:
            step = Step(slab, keys, rows, held, at, column, act(), lambda: None)
            step.replay = lambda: step.logits.copy_(act())
            return step
        graph, logits = _captured(act)
        return Step(slab, keys, rows, held, at, column, logits, graph.replay)


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The one that is recorded on: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


def _captured(act: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of `act`, and its result, which each replay writes again.

    Not `torch.cuda.graph`, which collects all garbage and empties the allocator's cache each time.
    """
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    beside = _stream(here.device_index)
    collects = gc.isenabled()
    gc.disable()  # what it frees may be another graph
    try:
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            act()  # libraries set themselves up outside the graph
            beside.synchronize()
            # Of this thread alone: NCCL's has its own calls to make.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                logits = act()
            finally:
                graph.capture_end()
        here.wait_stream(beside)
    finally:
        if collects:
            gc.enable()
    return graph, logits
