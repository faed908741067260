"""Bytes that generation takes beside what is resident."""

from __future__ import annotations

from rlhf.config.schema import RLConfig
from rlhf.families import FAMILIES
from rlhf.plan.activations import Batch, forward_bytes
from rlhf.plan.engines import Parts
from rlhf.plan.roles import Role


def sampling(role: Role, rl: RLConfig, rows: int, prompt: int, *, on_cpu: bool) -> Parts:
    """What answers prompts, beside what is resident."""
    if rl.rollout.engine != "vllm":
        return generation(role, rl, rows, prompt, on_cpu=on_cpu)
    # On a CPU it is resident already; the weights are gathered to be pushed.
    return role.bytes.whole + (
        Parts() if on_cpu else vllm_parts(role, rl, rows, prompt, on_cpu=False)
    )


def vllm_parts(role: Role, rl: RLConfig, rows: int, prompt: int, *, on_cpu: bool) -> Parts:
    """vLLM's own weights and cache. On a CPU its cache is a fixed 1 GB (rlhf/rollout/vllm.py); on a
    GPU this is the least that it needs: it takes the share of the device that it was given."""
    rollout = rl.rollout
    columns = min(rollout.batch_size, rows) * (prompt + rollout.max_new_tokens)
    cache = 2.0 * role.shape.layers * role.shape.kv_width * role.size * columns
    return Parts(weights=role.whole, kv_cache=float(2**30) if on_cpu else cache)


def repacked(role: Role, *, on_cpu: bool) -> float:
    """The copy of weights that `continuous` makes for a rollout (packing.py, blocks.py there).

    On a CPU: of all matrices and the head, tied or not. On a GPU: of those that become one product,
    where our own forward runs; it does not under adapters.
    """
    shape = role.shape
    if on_cpu:
        outside = sum(linear.size for linear in shape.outside_linears)
        layers = shape.layers * sum(linear.size for linear in shape.linears)
        return role.size * float(layers + outside + shape.embedding)
    packing = FAMILIES[shape.family].packing
    # OPT-350m has projections, and runs through its own forward.
    if packing is None or role.adapted or shape.outside_linears:
        return 0.0
    # Matrices over one input become one product.
    together = {
        path.rpartition(".")[2]
        for paths in (packing.qkv, packing.up)
        for path in paths
        if len(paths) > 1
    }
    copied = [
        linear.size for linear in shape.linears if packing.transposed or linear.name in together
    ]
    return role.size * float(shape.layers * sum(copied))


def generation(role: Role, rl: RLConfig, rows: int, prompt: int, *, on_cpu: bool) -> Parts:
    """The cache of keys and values, one step's logits, and the weights: gathered, and repacked."""
    shape, size, rollout = role.shape, role.size, rl.rollout
    slots = min(rollout.batch_size, rows)
    answer = rollout.max_new_tokens
    if on_cpu:
        spare = min(answer, 64) if rows > slots else 0
    else:  # columns come 128 at a time (rlhf/rollout/slab.py)
        spare = -answer % 128 + (128 if rows > slots else 0)
    per_column = 2.0 * shape.layers * shape.kv_width * size
    columns = prompt + answer + spare
    distinct = max(slots // rollout.samples_per_prompt, 1)
    kv_cache = per_column * (slots * columns + distinct * prompt)  # the slab, and the prefill's own
    reading = forward_bytes(shape, Batch(distinct, prompt, 1), size)
    logits = slots * shape.vocab * (3 * 4.0 + size)
    if rollout.engine == "hybrid" and rollout.hybrid_kernels:
        # DeepSpeed's kernels keep their own weights, and a cache for the whole batch.
        return role.bytes.whole + Parts(
            weights=role.whole, kv_cache=per_column * slots * columns, logits=logits
        )
    if rollout.gather == "never" and role.stage == 3:
        # What DeepSpeed leaves gathered from one layer to the next, as in any forward.
        return role.bytes.forward + Parts(activations=reading, logits=logits, kv_cache=kv_cache)
    # With vLLM the verdict's models answer through `continuous`.
    packed = 0.0 if rollout.engine == "hybrid" else repacked(role, on_cpu=on_cpu)
    return role.bytes.whole + Parts(
        weights=packed, activations=reading, logits=logits, kv_cache=kv_cache
    )
