"""Seconds and bytes sent of one iteration, from FLOPs and stated speeds.

A forward takes 2 FLOPs per weight of a matrix and token, and 4 x layers x query width for each of
the tokens that a token attends to (half the row, on average); a backward takes twice as much, and
checkpointing one forward more (Kaplan et al., arXiv 2001.08361, 2.1; PaLM, arXiv 2204.02311, B).

Bytes sent per rank are those measured on the wire for DeepSpeed 0.19.8 (docs/scaling.md): with
u = bytes of an element x parameters x (N - 1) / N and g passes a step, 2u at ZeRO-0, 3u at 1,
(2g + 1) u at 2, 3g u at 3. Computing and sending are not taken to overlap: an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config.resolve import accumulation
from rlhf.config.schema import RunConfig
from rlhf.families import ModelShape
from rlhf.plan.engines import effective_stage
from rlhf.plan.hardware import Speeds
from rlhf.plan.roles import Ranks, Role, Shapes, ppo_roles, step_role


@dataclass(frozen=True)
class StepTime:
    """One iteration: an optimiser step in steps 1 and 2, a rollout with its updates in step 3."""

    seconds: float
    compute: float
    """Seconds of it in forwards and backwards."""
    generate: float
    """Seconds of it in generation."""
    send: float
    """Seconds of it in communication between ranks."""
    offload: float
    """Seconds of it between the device and RAM, and in the optimiser there."""
    sent: float
    """Bytes that a rank sends."""
    rows: int
    """Rows (step 2: pairs; step 3: answers) over all ranks."""


def forward_flops(shape: ModelShape, tokens: float, width: float, *, head: bool = True) -> float:
    """FLOPs of a forward over `tokens` tokens in rows of `width`."""
    matrices = shape.layers * sum(linear.inputs * linear.outputs for linear in shape.linears)
    matrices += shape.embedding if head else 0
    return tokens * (2.0 * matrices + 4.0 * shape.layers * shape.query_width * width / 2)


def training_flops(role: Role, tokens: float, width: float) -> float:
    """FLOPs of forward and backward; adapters save the frozen weights' gradients."""
    forward = forward_flops(role.shape, tokens, width, head=not role.scalar)
    times = 2.0 if role.model.lora.rank else 3.0
    return forward * (times + (1.0 if role.model.gradient_checkpointing else 0.0))


def sent_per_step(role: Role, world: int, passes: int) -> float:
    """Bytes that a rank sends in one optimiser step of `passes` micro-batches."""
    total, trained = role.whole / role.size, role.trained
    share = role.size * (world - 1) / world
    per_stage = {0: 2.0, 1: 3.0, 2: 2.0 * passes + 1.0}
    if role.stage == 3:
        return share * passes * (2.0 * total + trained)  # gathered twice, reduced once
    return share * trained * per_stage[role.stage]


def offload_seconds(role: Role, world: int, passes: int, speeds: Speeds) -> float:
    """Of one optimiser step with the optimiser in RAM: gradients go down, weights come up, AdamW
    reads and writes 28 bytes a parameter; at ZeRO-3 the shards come up twice a pass too."""
    if role.engine.offload == "none" or effective_stage(role.engine, role.dtype) == 0:
        return 0.0
    share = role.trained / world
    moved = 2.0 * role.size * share
    if role.stage == 3:
        moved += (2.0 if role.trains else 1.0) * passes * role.whole / world
    return moved / speeds.host + 28.0 * share / speeds.host_memory


def step_time(
    config: RunConfig, step: int, shapes: Shapes, ranks: Ranks, speeds: Speeds
) -> StepTime:
    """One iteration of a step on ranks of these speeds; ranks of a CPU share its cores."""
    wire = speeds.inside if ranks.world <= ranks.per_node else speeds.between
    if step == 3:
        return _ppo_time(config, shapes, ranks, speeds, wire)
    section = config.step1 if step == 1 else config.step2
    role = step_role(config, step, shapes, ranks)
    width = section.max_length or config.step1.max_length
    rows = section.train.batch_size
    tokens = rows * width * (2 if step == 2 else 1) / ranks.world
    compute = training_flops(role, tokens, width) / speeds.flops
    passes = accumulation(config, step, ranks.world)
    sent = sent_per_step(role, ranks.world, passes)
    offload = 0.0 if ranks.on_cpu else offload_seconds(role, ranks.world, passes, speeds)
    total = compute + sent / wire + offload
    return StepTime(total, compute, 0.0, sent / wire, offload, sent, rows)


def _ppo_time(
    config: RunConfig, shapes: Shapes, ranks: Ranks, speeds: Speeds, wire: float
) -> StepTime:
    rl = config.step3
    roles = ppo_roles(config, shapes, ranks)
    prompt = rl.rollout.max_prompt_length or config.step1.max_prompt_length
    answer = rl.rollout.max_new_tokens
    width = prompt + answer
    answers = rl.rollout.prompts * rl.rollout.samples_per_prompt
    mine = max(answers // ranks.world, 1)
    passes = max(1, -(-mine // rl.micro_batch_size))
    compute, sent, offload = 0.0, 0.0, 0.0
    for role in roles.values():
        forward = forward_flops(role.shape, mine * width, width, head=not role.scalar)
        compute += forward / speeds.flops  # act 2: each model reads the answers
        shards = role.stage == 3
        sent += passes * role.whole * (ranks.world - 1) / ranks.world if shards else 0.0
        if role.trains:
            compute += rl.ppo.epochs * training_flops(role, mine * width, width) / speeds.flops
            steps = rl.ppo.epochs * rl.ppo.minibatches
            each = -(-passes // rl.ppo.minibatches)
            sent += steps * sent_per_step(role, ranks.world, each)
            offload += steps * offload_seconds(role, ranks.world, each, speeds)
        else:
            offload += offload_seconds(role, ranks.world, passes, speeds)
    actor = roles["actor"]
    slots = min(rl.rollout.batch_size, mine)
    if actor.stage == 3:  # gathered for generation: once, or for each forward of each turn
        times = -(-mine // slots) * answer if rl.rollout.gather == "never" else 1
        sent += times * actor.whole * (ranks.world - 1) / ranks.world
    generate = generation_seconds(actor, speeds, mine, slots, prompt, answer)
    send = sent / wire
    offload = 0.0 if ranks.on_cpu else offload
    total = compute + generate + send + offload
    return StepTime(total, compute, generate, send, offload, sent, answers)


def generation_seconds(
    role: Role, speeds: Speeds, rows: int, slots: int, prompt: int, answer: int
) -> float:
    """Prefill by FLOPs; each decode step by the larger of its FLOPs and its reading of weights and
    cache, for `rows` answers of full length in turns of `slots`."""
    shape = role.shape
    prefill = forward_flops(shape, rows * prompt, prompt) / speeds.flops
    cache = 2.0 * shape.layers * shape.kv_width * role.size * (prompt + answer / 2)
    read = (role.whole + slots * cache) / speeds.memory
    work = forward_flops(shape, slots, 2 * (prompt + answer / 2)) / speeds.flops
    return prefill + -(-rows // slots) * answer * max(read, work)
