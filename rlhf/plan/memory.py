"""Bytes per rank at each moment of each step; the largest moment decides whether a step fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf.config.resolve import accumulation
from rlhf.config.schema import EngineConfig, ModelConfig, RunConfig
from rlhf.config.trees import at
from rlhf.plan.activations import Batch, forward_bytes, logits_bytes, saved_bytes
from rlhf.plan.engines import Parts, effective_stage
from rlhf.plan.roles import Ranks, Role, Shapes, dtype_of, ppo_roles, shares_base, step_role
from rlhf.plan.rollout import generation, sampling, vllm_parts
from rlhf.stages import Stage

# What a process holds on a CPU besides tensors once it trains, over its size after the imports:
# allocator, thread and kernel buffers. Measured: `python -m benchmarks.plan --baseline`.
CPU_FRAMEWORK = 85e6
CPU_FRAMEWORK_ZERO = 50e6  # more, with ZeRO 1-3
CPU_IMPORTS = 450e6  # after the imports: python, torch, deepspeed, transformers, datasets
# CUDA context, cuBLAS and NCCL buffers. A common figure; not measured here.
GPU_FRAMEWORK = 2.0e9


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one rank of one step, by moment."""

    stage: Stage
    moments: dict[str, Parts]

    @property
    def worst(self) -> str:
        """The moment with the most bytes on the device."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def peak(self) -> float:
        """Bytes on the device at the worst moment."""
        return self.moments[self.worst].total

    @property
    def host(self) -> float:
        """Bytes of one rank in RAM beside the device, at the worst moment for RAM."""
        return max(parts.host for parts in self.moments.values())


def step_memory(config: RunConfig, stage: Stage, shapes: Shapes, ranks: Ranks) -> StepMemory:
    """What a rank of this stage holds. `config` as the stage gets it (`resolve_step`)."""
    if stage.generates:
        moments = _ppo(config, shapes, ranks)
    else:
        moments = _supervised(config, stage, shapes, ranks)
    base = Parts(framework=GPU_FRAMEWORK)
    if ranks.on_cpu:
        zero = any(
            effective_stage(engine, dtype_of(model, True))
            for model, engine in _trained(config, stage)
        )
        base = Parts(framework=CPU_FRAMEWORK + (CPU_FRAMEWORK_ZERO if zero else 0.0))
        moments = {name: _in_ram(parts) for name, parts in moments.items()}
    return StepMemory(stage, {name: parts + base for name, parts in moments.items()})


def _trained(config: RunConfig, stage: Stage) -> list[tuple[ModelConfig, EngineConfig]]:
    roles = (at(config, place) for place in stage.models)
    return [(role.model, role.engine) for role in roles]


def _in_ram(parts: Parts) -> Parts:
    """On a CPU everything is in RAM: copies on the host count with the weights."""
    return replace(parts, weights=parts.weights + parts.host, host=0.0)


def _training(
    role: Role, batch: Batch, ranks: Ranks, *, passes: int, dropout: bool, entropy: bool = False
) -> dict[str, Parts]:
    """Moments of one optimiser step, on top of what is resident."""
    activations = saved_bytes(
        role.shape,
        batch,
        role.size,
        lora=role.model.lora,
        checkpointing=role.model.gradient_checkpointing,
        dropout=dropout,
        fused_attention=not ranks.on_cpu,
    )
    logits = 0.0
    if not role.scalar:
        logits = logits_bytes(role.shape, batch, role.size, gradients=True, entropy=entropy)
    engine = role.bytes
    backward = engine.forward + engine.backward
    if passes == 1 and ranks.on_cpu:
        # Gradients take the place of activations as the backward goes; with more passes they stay.
        activations = max(activations - backward.gradients, 0.0)
    return {
        "backward": backward + Parts(activations=activations, logits=logits),
        "reduce": engine.reduce,
        "step": engine.step,
    }


def _supervised(config: RunConfig, stage: Stage, shapes: Shapes, ranks: Ranks) -> dict[str, Parts]:
    section: Any = at(config, stage.section)
    role = step_role(config, stage, shapes, ranks)
    width = section.max_length or config.step1.max_length
    prompt = section.max_prompt_length or config.step1.max_prompt_length
    counted = width if stage.scalar or config.step1.prompt_loss else width - prompt
    sides = 2 if stage.rows == "pairs" else 1
    share = -(-section.train.batch_size // ranks.world)
    passes = accumulation(config, stage, ranks.world)
    train = section.train
    rows = _within(train.micro_batch_tokens, min(train.micro_batch_size, share), sides * width)
    if rows < min(train.micro_batch_size, share):
        passes = max(passes, -(-share // rows))
    batch = Batch(sides * rows, width, counted)
    resident = role.bytes.resident
    moments = {"load": _loading([role], ranks)}
    moments |= {
        name: resident + parts
        for name, parts in _training(role, batch, ranks, passes=passes, dropout=True).items()
    }
    held_out = Batch(sides * section.train.eval_batch_size, width, counted)
    moments["evaluate"] = resident + _reading(role, held_out)
    moments["publish"] = resident + _copied(role.whole, ranks)
    return moments


def _copied(whole: float, ranks: Ranks) -> Parts:
    """What is published, which rank 0 alone copies to RAM. On a CPU that rank decides; beside GPUs
    each has its share of the machine's RAM, and so of the copy."""
    return Parts(host=whole if ranks.on_cpu else whole / min(ranks.per_node, ranks.world))


def _within(tokens: int | None, rows: int, width: int) -> int:
    """Rows of full length in a micro-batch of at most so many tokens; always one."""
    return rows if tokens is None else max(1, min(rows, tokens // width))


def _loading(roles: list[Role], ranks: Ranks) -> Parts:
    """While the last of the models is read: on a CPU the file's pages are there beside the weights,
    unless they are the weights; for a GPU each rank reads the whole model into RAM first."""
    last, held = roles[-1], Parts()
    for role in roles[:-1]:
        held += role.bytes.resident
    parameters = last.whole / last.size
    if not ranks.on_cpu:
        return held + Parts(host=0.0 if last.engine.zero_stage == 3 else last.whole)
    file = 0.0 if last.size == last.shape.stored else last.shape.stored * parameters
    return held + Parts(weights=last.bytes.resident.weights + file)


def _reading(role: Role, batch: Batch) -> Parts:
    """A forward without gradients."""
    logits = 0.0
    if not role.scalar:
        logits = logits_bytes(role.shape, batch, role.size, gradients=False)
    activations = forward_bytes(role.shape, batch, role.size)
    return role.bytes.forward + Parts(activations=activations, logits=logits)


def _ppo(config: RunConfig, shapes: Shapes, ranks: Ranks) -> dict[str, Parts]:
    rl = config.step3
    roles = ppo_roles(config, shapes, ranks)
    resident = Parts()
    for role in roles.values():
        resident += role.bytes.resident
    actor = roles["actor"]
    shared = shares_base(config, on_cpu=ranks.on_cpu)
    if shared:
        # Reference, reward model and critic read the policy's frozen weights; theirs are adapters.
        others = (role for name, role in roles.items() if name != "actor")
        resident += Parts(weights=-sum(role.whole for role in others))
    if rl.rollout.engine == "vllm" and ranks.on_cpu:
        resident += vllm_parts(actor, rl, 0, 0, on_cpu=True)  # on a GPU it sleeps meanwhile
    if rl.ppo.ema_decay:
        resident += Parts(optimizer=4.0 * actor.trained / (ranks.world if actor.stage == 3 else 1))
    prompt = rl.rollout.max_prompt_length or config.step1.max_prompt_length
    answer = rl.rollout.max_new_tokens
    rows = max(rl.rollout.prompts // ranks.world, 1) * rl.rollout.samples_per_prompt
    in_minibatch = max(rows // rl.ppo.minibatches, 1)
    passes = -(-in_minibatch // rl.micro_batch_size)
    together = _within(
        rl.micro_batch_tokens, min(rl.micro_batch_size, in_minibatch), prompt + answer
    )
    passes = max(passes, -(-in_minibatch // together))
    batch = Batch(together, prompt + answer, answer, padded=True)
    moments = {
        "load": _loading([actor] if shared else list(roles.values()), ranks),
        "generate": resident + sampling(actor, rl, rows, prompt, on_cpu=ranks.on_cpu),
    }
    for name, role in roles.items():
        moments[f"score with {name}"] = resident + _reading(role, batch)
        if role.trains:
            training = _training(
                role, batch, ranks, passes=passes, dropout=False, entropy=not role.scalar
            )
            moments |= {f"{name} {at}": resident + parts for at, parts in training.items()}
    # The verdict reads one more model: what step 1 started from.
    base = roles["reference"]
    asked = max(rl.eval.prompts // ranks.world, 1)
    moments["verdict"] = (
        resident + base.bytes.resident + generation(base, rl, asked, prompt, on_cpu=ranks.on_cpu)
    )
    copies = sum(role.whole for role in roles.values() if role.trains)
    moments["publish"] = resident + _copied(copies, ranks)
    return moments


def summary(memory: StepMemory) -> Mapping[str, float]:
    """The parts at the worst moment that are not 0, largest first."""
    parts = memory.moments[memory.worst].named()
    return dict(sorted(((k, v) for k, v in parts.items() if v), key=lambda item: -item[1]))
