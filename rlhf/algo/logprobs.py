"""Log-probabilities of given tokens, without ever holding the logits of all positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LogitsOf = Callable[[Tensor], Tensor]
CHUNK = 512


def log_probs_from_logits(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of `targets` under softmax(logits / temperature) (15, 33).

    Shapes: logits (..., V) of any float dtype, targets (...) of ids in [0, V). Returns (...)
    float32 log-probs and, with `with_entropy`, the (...) float32 entropy of the same distribution
    in nats. A logit of -inf is a token of probability 0 and adds nothing to the entropy.
    """
    log_softmax = torch.log_softmax(logits.float() / temperature, dim=-1)
    picked = log_softmax.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    if not with_entropy:
        return picked, None
    # 0 * -inf is NaN in both directions; p log p -> 0 as p -> 0.
    finite = log_softmax.masked_fill(log_softmax == -torch.inf, 0.0)
    return picked, -(log_softmax.exp() * finite).sum(-1)


def log_probs_from_hidden(
    hidden: Tensor,
    lm_head: LogitsOf,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    with_entropy: bool = False,
    mask: Tensor | None = None,
    logit_transform: LogitsOf | None = None,
    min_calls: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (and entropy) of `targets` from the hidden states that predict them.

    Shapes: hidden (N, D) or (B, A, D), targets (N) or (B, A) -> float32 of the targets' shape.
    `lm_head` maps (n, D) -> (n, V) logits and is called as it is, so that its module hooks (ZeRO-3
    gathering, LoRA) run; `logit_transform` (say, soft-capping) acts on its float32 output, before
    the temperature. With `mask`, only counted positions are computed; the others are 0 and their
    targets may be anything (-100).

    At most `chunk` rows of logits exist at once. Under autograd each chunk is checkpointed: its
    logits are made again in the backward pass.

    The number of `lm_head` calls is max(min_calls, ceil(targets.numel() / chunk)), whatever the
    mask, and with no row at all it is still min_calls: a ZeRO-3 `lm_head` is a collective, so ranks
    must agree on it. Where ranks' shapes differ, pass the largest count as `min_calls`.

    Raises ValueError for shapes that do not fit, temperature <= 0, chunk < 1 or min_calls < 1.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} does not fit targets {tuple(targets.shape)}: "
            "hidden needs one more, last dimension"
        )
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"mask {tuple(mask.shape)} is not shaped like targets {targets.shape}")
    if temperature <= 0 or chunk < 1 or min_calls < 1:
        raise ValueError(
            f"temperature {temperature}, chunk {chunk}, min_calls {min_calls}: "
            "they must be > 0, >= 1 and >= 1"
        )
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    counted = None
    if mask is not None:
        counted = mask.reshape(-1).nonzero().squeeze(-1)
        rows, ids = rows[counted], ids[counted]

    def one_chunk(part: Tensor, part_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = lm_head(part).float()
        if logit_transform is not None:
            logits = logit_transform(logits)
        return log_probs_from_logits(logits, part_ids, temperature, with_entropy)

    log_probs, entropies = [], []
    calls = max(min_calls, -(-targets.numel() // chunk))
    for part, part_ids in zip(rows.tensor_split(calls), ids.tensor_split(calls), strict=True):
        if torch.is_grad_enabled():
            # Not the re-entrant kind: that one fires the gradient hooks of the head's weights once
            # per chunk, which ZeRO refuses, and needs hidden states that require grad.
            log_prob, entropy = checkpoint(one_chunk, part, part_ids, use_reentrant=False)
        else:
            log_prob, entropy = one_chunk(part, part_ids)
        log_probs.append(log_prob)
        entropies.append(entropy)

    def whole(parts: list[Tensor]) -> Tensor:
        flat = torch.cat(parts)
        if counted is not None:
            flat = flat.new_zeros(targets.numel()).index_copy(0, counted, flat)
        return flat.view(targets.shape)

    return whole(log_probs), whole(entropies) if with_entropy else None
