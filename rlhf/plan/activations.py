"""What one forward keeps for its backward, and what it needs while it runs, in bytes.

What one layer keeps is said by its family (rlhf/families).
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config.training import LoraConfig
from rlhf.families import FAMILIES, ModelShape, Saved
from rlhf.plan.lora import adapted_layers, adapted_linears

HEAD_CHUNK = 256  # token rows of logits alive at once (rlhf/models/causal.py; a test compares)


# Of rlhf/models/attention.py (a test compares).
QUERY_BLOCK, KEPT = 64, 8


# Outside the layers: embedding output, final norm.
OUTSIDE = 3.0


@dataclass(frozen=True)
class Batch:
    """One forward: `rows` of `width` tokens, `counted` of them in each row with a loss.

    `padded` rows differ in length: a mask of width x width is then made for each layer.
    """

    rows: int
    width: int
    counted: int
    padded: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.width


def saved_bytes(
    shape: ModelShape,
    batch: Batch,
    size: int,
    *,
    lora: LoraConfig | None = None,
    checkpointing: bool = False,
    dropout: bool = False,
    fused_attention: bool = True,
) -> float:
    """Bytes kept from forward to backward.

    Args:
        size: bytes of an element.
        dropout: the model's own dropout is on (steps 1 and 2).
        fused_attention: attention keeps nothing of width x width, dropout or not (GPU kernels).
    """
    lora = lora or LoraConfig()
    layer = _layer(shape, batch, size, lora, dropout, fused_attention)
    trained = adapted_layers(shape, lora) if lora.rank else shape.layers
    if not checkpointing:
        return trained * layer + OUTSIDE * batch.tokens * shape.hidden * size
    # Inputs of all layers are kept, and one layer at a time is made again (by torch's own kernel).
    return (shape.layers + OUTSIDE) * batch.tokens * shape.hidden * size + layer


def _layer(
    shape: ModelShape,
    batch: Batch,
    size: int,
    lora: LoraConfig,
    dropout: bool,
    fused_attention: bool,
) -> float:
    saved = _saved(shape)
    narrow = size < 4
    hidden = saved.hidden + (saved.hidden_16 if narrow else 0.0)
    hidden -= saved.frozen if lora.rank else 0.0
    if dropout and shape.dropout:
        hidden += 2.0
    extra = saved.query_kv_16 if narrow else 0.0
    width = hidden * shape.hidden + saved.mlp * shape.mlp
    width += (saved.query + extra) * shape.query_width + (saved.kv + extra) * shape.kv_width
    width += lora.rank * len(adapted_linears(shape, lora))
    square = batch.rows * batch.width**2 * size
    eager = (saved.eager_16 if narrow else saved.eager) * shape.heads
    if dropout and shape.attention_dropout and not fused_attention:
        eager += 3 * shape.heads
    kept = 0 if fused_attention or eager or not narrow else _kept_weights(shape, batch)
    made = batch.tokens * width + kept
    return made * size + square * (eager + (1 if batch.padded else 0))


def _saved(shape: ModelShape) -> Saved:
    saved = FAMILIES[shape.family].saved
    assert saved is not None, "a family with a shape says what its layers keep"
    return saved


def _kept_weights(shape: ModelShape, batch: Batch) -> int:
    """Elements of attention weights that short rows keep in 16 bits on a CPU, future keys left out
    by blocks of queries."""
    if batch.width > KEPT * shape.head_dim:
        return 0
    starts = range(0, batch.width, QUERY_BLOCK)
    ends = [(start, min(start + QUERY_BLOCK, batch.width)) for start in starts]
    return batch.rows * shape.heads * sum((end - start) * end for start, end in ends)


def forward_bytes(shape: ModelShape, batch: Batch, size: int) -> float:
    """Bytes alive at once in a forward without gradients: one layer's widest moment."""
    per_token = 5 * shape.hidden + 3 * shape.mlp
    square = _saved(shape).eager and 2 * shape.heads * batch.rows * batch.width**2
    return (batch.tokens * per_token + square) * size


def logits_bytes(
    shape: ModelShape, batch: Batch, size: int, *, gradients: bool, entropy: bool = False
) -> float:
    """The chunk of logits that is alive at once, with its softmax and their gradients."""
    calls = max(1, -(-batch.rows * (batch.width - 1) // HEAD_CHUNK))
    rows = -(-batch.rows * batch.counted // calls)
    copies = 4.0 if gradients else 3.0
    if entropy:
        copies += 3.0
    # In 16 bits the head's own output is there too.
    own = size if size < 4 else 0
    return rows * shape.vocab * (4 * copies + own)
