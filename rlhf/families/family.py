"""What can be special about a model family. Data only: the planner reads it without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.families.shape import Config, ModelShape

TINY_VOCAB = 1024
TINY_SIZE = {"hidden": 128, "layers": 2, "heads": 4, "mlp": 352, "positions": 512}
"""Sizes of `tiny:FAMILY`: about half a million parameters."""

Size = Mapping[str, int]
"""The keys of TINY_SIZE."""


@dataclass(frozen=True)
class Saved:
    """Tensors that one layer keeps for its backward, per token, counted in widths: so many of
    `hidden`, ...

    Read off torch's saved tensors with transformers 5.23 on its `sdpa` attention; a test repeats
    the reading for every family.
    """

    hidden: float
    query: float
    kv: float
    mlp: float
    hidden_16: float = 0.0
    """More of them where the model runs in 16 bits: norms compute in fp32."""
    query_kv_16: float = 0.0
    frozen: float = 0.0
    """Fewer of them under adapters, where the norms' weights are frozen."""
    eager: int = 0
    """Tensors of rows x heads x width x width, where attention has no kernel."""
    eager_16: int = 0
    """As many, where the model runs in 16 bits: softmax computes in fp32."""


@dataclass(frozen=True)
class Parts:
    """Names of a layer's parts. From `enter` to `leave` a layer only treats positions one by one;
    so does `out`, the projection that ends attention."""

    attention: str
    out: str
    enter: str = "mlp"
    leave: str = "mlp"


@dataclass(frozen=True)
class Packing:
    """Where the packed forward finds the modules of a decoder with norms before each part:
    dotted paths, from the model or from a layer.

    x += out(attention(qkv(attention_norm(x)))); x += down(act(up(mlp_norm(x)))).
    """

    layers: str
    embed: str
    final_norm: str
    attention: str
    attention_norm: str
    mlp_norm: str
    qkv: tuple[str, ...]
    """Queries, keys and values: three linear layers, or one with all of them in this order."""
    out: str
    up: tuple[str, ...]
    """Two where the feed-forward is gated: gate, then up."""
    activation: str
    down: str
    position_table: str | None = None
    rotary: str | None = None
    head_norms: tuple[str, str] | None = None
    """Norms of queries and keys, per head."""
    transposed: bool = False
    """The matrices are stored inputs first (GPT-2's Conv1D): packing always copies them."""
    refuses: Callable[[Any], str | None] = lambda config: None
    """Why a model of this configuration needs its own forward; None: it does not."""


@dataclass(frozen=True)
class LogitScale:
    """What the family does to its output head's product: `name` is a setting of its config."""

    kind: Literal["cap", "multiply", "divide"]
    name: str


@dataclass(frozen=True)
class Family:
    """One `model_type`. What is None is not known, or is as in every decoder."""

    model_type: str
    causal_class: str = ""
    """transformers' class with the language model's head."""
    layer_class: str = ""
    shape: Callable[[Config], ModelShape] | None = None
    """Raises KeyError or TypeError where the configuration lacks a size."""
    saved: Saved | None = None
    known: Mapping[str, Config] = field(default_factory=dict)
    """Configurations of public models by hub id, so that planning needs no network."""
    tiny: Callable[[Size], dict[str, Any]] | None = None
    """Settings of the configuration of `tiny:FAMILY`, dropout 0."""
    parts: Parts | None = None
    packing: Packing | None = None
    logits: LogitScale | None = None
    hybrid_kernels: bool = False
    """DeepSpeed's inference kernels answer as the model does: seen on a GPU (docs/gpu.md)."""
