"""A decoder's shape, as the planner counts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
"""A `config.json`, with transformers' names."""


@dataclass(frozen=True)
class Linear:
    """One matrix of a layer, `inputs` x `outputs`, perhaps with a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def size(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class ModelShape:
    """Everything that memory and time depend on. Sizes are numbers of elements."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    linears: tuple[Linear, ...]
    """The matrices of one layer."""
    layer_rest: int
    """A layer's other parameters: norms."""
    outside: int
    """Parameters outside the layers but for embedding and head: positions, final norm ..."""
    embed_dim: int
    """Width of embedding and head; not `hidden` for opt-350m alone."""
    tied: bool
    outside_linears: tuple[Linear, ...] = ()
    """Linears among `outside` (opt-350m's projections), which adapters on all linears adapt."""
    head_bias: bool = False
    """The language model's head has a bias."""
    positions: int | None = None
    """Longest row, where the family has a table or states a limit."""
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stored: int = 2
    """Bytes of an element in the model's files."""

    @property
    def embedding(self) -> int:
        return self.vocab * self.embed_dim

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        return sum(linear.size for linear in self.linears) + self.layer_rest

    @property
    def backbone(self) -> int:
        """Parameters without the output head."""
        return self.embedding + self.layers * self.layer + self.outside

    @property
    def causal(self) -> int:
        """Parameters of the causal LM; tied weights once."""
        bias = self.vocab if self.head_bias else 0
        return self.backbone + bias + (0 if self.tied else self.embedding)

    @property
    def scalar(self) -> int:
        """Parameters with a scalar head instead of the LM head."""
        return self.backbone + self.embed_dim

    @property
    def largest(self) -> int:
        """Elements of the largest single parameter."""
        return max(self.embedding, *(linear.inputs * linear.outputs for linear in self.linears))

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


def layer_norm_decoder(
    config: Config,
    *,
    hidden: int,
    layers: int,
    heads: int,
    mlp: int,
    linears: tuple[Linear, ...],
    layer_rest: int,
    outside: int,
    tied: bool,
    positions: int | None,
    dropout: float,
    attention_dropout: float,
) -> ModelShape:
    """As many key heads as query heads, layer norms, a feed-forward of two matrices.

    `tied` is the family's default; the configuration may say otherwise.
    """
    return ModelShape(
        family=config["model_type"],
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mlp=mlp,
        vocab=config["vocab_size"],
        linears=linears,
        layer_rest=layer_rest,
        outside=outside,
        embed_dim=hidden,
        tied=bool(config.get("tie_word_embeddings", tied)),
        positions=positions,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )


def fused(hidden: int, mlp: int, names: tuple[str, str, str, str]) -> tuple[Linear, ...]:
    """A layer's four matrices with biases: fused queries, keys and values; output; up; down."""
    qkv, dense, up, down = names
    return (
        Linear(qkv, hidden, 3 * hidden, True),
        Linear(dense, hidden, hidden, True),
        Linear(up, hidden, mlp, True),
        Linear(down, mlp, hidden, True),
    )
