"""Weights repacked once per rollout for products of few rows.

A decode step multiplies some ten rows with every weight. oneDNN is up to twice as fast there when
the weight is stored in its own order, and weights do not change during a rollout: so they are
reordered at its start (a copy of them while it lasts, in about the time of one decode step). On
other devices, in other dtypes and without oneDNN a plain product is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# Layout depends on it a little, results do not: any number of rows may follow.
_ROWS = 16


def can_pack(weight: Tensor) -> bool:
    """True where oneDNN has a fast product for this device and dtype."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class Packed:
    """One or several linear layers over the same input as one product: x (R, K) -> (R, sum N).

    Args:
        weights: (N, K) each.
        biases: (N,) each, or None.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        weight = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0]
        weight = weight.detach().contiguous()
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            parts = [
                weight.new_zeros(len(w)) if bias is None else bias.detach()
                for w, bias in zip(weights, biases, strict=True)
            ]
            self.bias = torch.cat(parts)
        self._packed = can_pack(weight)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self.weight = weight

    def __call__(self, rows: Tensor) -> Tensor:
        if not self._packed:
            return F.linear(rows, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")

    def added_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        """residual (R, N) + the product, as one operation where there is one."""
        if not self._packed:
            return residual + F.linear(rows, self.weight, self.bias)
        binary = torch.ops.mkldnn._linear_pointwise.binary
        return binary(rows, residual, self.weight, self.bias, "add")


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(N, K) weight and (N,) bias of a plain linear layer; None for anything else, subclasses
    and adapters included."""
    if type(module) is nn.Linear:
        return module.weight, module.bias
    if type(module) is Conv1D:  # GPT-2's: weight (K, N)
        return module.weight.t(), module.bias
    return None


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Inside, the model's plain linear layers multiply with packed weights.

    For models without a decoder of ours (rlhf/rollout/lean.py), and below adapters.
    """
    changed: list[Any] = []
    try:
        for module in model.modules():
            found = weight_and_bias(module)
            if found is None or found[0].dim() != 2 or not can_pack(found[0]):
                continue
            if "forward" in vars(module):  # somebody else's patch
                continue
            module.forward = _flattened(Packed([found[0]], [found[1]]))
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _flattened(packed: Packed) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return packed(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    return forward
