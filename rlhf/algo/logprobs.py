"""Log-probabilities of given tokens, without ever holding the logits of all positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LogitsOf = Callable[[Tensor], Tensor]
# (n,) log-probs, (n,) entropies or None, which of the N rows -> the sum of their losses
TokenLoss = Callable[[Tensor, Tensor | None, slice], Tensor]
CHUNK = 256  # rows of logits alive at once; measured: docs/performance.md


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

    The number of `lm_head` calls is max(min_calls, ceil(counted positions / chunk)), and with no
    row at all it is still min_calls: a ZeRO-3 `lm_head` is a collective, so ranks must agree on it.
    Where their counts differ, pass the largest number of calls as `min_calls` (`head_calls`).

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
    calls = max(min_calls, head_calls(len(ids), chunk))
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


def head_calls(counted: int, chunk: int = CHUNK) -> int:
    """Chunks that `counted` positions need; one where there is none."""
    return max(1, -(-counted // chunk))


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_loss: TokenLoss,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    with_entropy: bool = False,
) -> Tensor:
    """Sum of a loss over positions, straight from the hidden states that predict them.

    Shapes: hidden (N, D), weight (V, D) and bias (V) or None of a linear head, targets (N) ->
    scalar float32. `token_loss` gets the float32 log-probs and entropies of at most `chunk` rows at
    a time, and is differentiated on the spot: each chunk's gradients are made in the forward pass,
    from logits that are then dropped, and only scaled in the backward pass. So there are three
    products with the weight, not the four of a checkpointed head, and full logits never exist. A
    bias gets no gradient.

    The gradient of the weight is summed over the chunks in float32 (33).
    """
    if bias is not None and bias.requires_grad:
        raise ValueError("head_loss: the head's bias is trained; use log_probs_from_hidden")
    return _HeadLoss.apply(
        hidden, weight, bias, targets, token_loss, temperature, chunk, with_entropy
    )


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_loss: TokenLoss,
        temperature: float,
        chunk: int,
        with_entropy: bool,
    ) -> Tensor:
        wanted_hidden, wanted_weight, *_ = ctx.needs_input_grad
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden) if wanted_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted_weight else None
        for start in range(0, len(targets), chunk):
            where = slice(start, min(start + chunk, len(targets)))
            part, ids = hidden[where], targets[where].long().unsqueeze(1)
            logits = torch.nn.functional.linear(part, weight, bias).float()
            if temperature != 1.0:
                logits.div_(temperature)
            log_softmax = torch.log_softmax(logits, dim=-1)
            del logits
            if bias is not None:  # -inf is a token of probability 0
                log_softmax.clamp_(min=torch.finfo(torch.float32).min)
            slope = log_softmax.exp()  # first the probabilities, then the gradient of the logits
            entropy = -torch.linalg.vecdot(slope, log_softmax) if with_entropy else None
            log_probs = log_softmax.gather(1, ids).squeeze(1)
            loss, by_log_prob, by_entropy = _differentiated(token_loss, log_probs, entropy, where)
            total += loss
            if by_entropy is not None and entropy is not None:
                log_softmax.add_(entropy.unsqueeze(1)).mul_(by_entropy.unsqueeze(1))
                slope.mul_(log_softmax.add_(by_log_prob.unsqueeze(1)).neg_())
            else:
                slope.mul_(-by_log_prob.unsqueeze(1))
            slope.scatter_add_(1, ids, by_log_prob.unsqueeze(1))
            slope = (slope.div_(temperature) if temperature != 1.0 else slope).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[where] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.t() @ part
        ctx.gradients = grad_hidden, grad_weight
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.gradients
        (scale,) = grads
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _differentiated(
    token_loss: TokenLoss, log_probs: Tensor, entropy: Tensor | None, where: slice
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of some rows, and its gradients by log-prob and, if it has one, by entropy."""
    with torch.enable_grad():
        leaves = [log_probs.requires_grad_()]
        if entropy is not None:
            leaves.append(entropy.requires_grad_())
        loss = token_loss(log_probs, entropy, where)
        if not loss.requires_grad:
            return loss, torch.zeros_like(log_probs), None
        by_log_prob, *rest = torch.autograd.grad(loss, leaves, allow_unused=True)
    if by_log_prob is None:
        by_log_prob = torch.zeros_like(log_probs)
    return loss.detach(), by_log_prob, rest[0] if rest else None
