"""The models of a step and their engines, as far as settings and shapes tell."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config.schema import EngineConfig, ModelConfig, RunConfig
from rlhf.config.trees import at
from rlhf.families import ModelShape
from rlhf.plan.engines import SIZES, EngineBytes, effective_stage, engine_bytes
from rlhf.plan.lora import adapter_parameters
from rlhf.stages import Stage

NEEDS_CRITIC = {"ppo": True, "grpo": False, "rloo": False, "reinforce++": False}


@dataclass(frozen=True)
class Ranks:
    """How many processes, and on what."""

    world: int
    on_cpu: bool
    per_node: int = 1


@dataclass(frozen=True)
class Shapes:
    """The models that a run's steps build on."""

    actor: ModelShape
    reward: ModelShape


def dtype_of(model: ModelConfig, on_cpu: bool) -> str:
    """As rlhf/models/loading.py chooses `auto`."""
    return ("float32" if on_cpu else "bfloat16") if model.dtype == "auto" else model.dtype


@dataclass(frozen=True)
class Role:
    """A model in an engine, and what it does."""

    shape: ModelShape
    model: ModelConfig
    engine: EngineConfig
    dtype: str
    scalar: bool
    trained: int
    """Parameters with gradients; 0 of a frozen role."""
    bytes: EngineBytes

    @property
    def stage(self) -> int:
        """The ZeRO stage that it runs at."""
        return effective_stage(self.engine, self.dtype, self.trains)

    @property
    def size(self) -> int:
        return SIZES[self.dtype]

    @property
    def trains(self) -> bool:
        return self.trained > 0

    @property
    def adapted(self) -> bool:
        """It carries adapters; those of a frozen role are merged."""
        return self.trains and self.model.lora.rank > 0

    @property
    def whole(self) -> float:
        """All weights, once."""
        return self.size * float(self.shape.scalar if self.scalar else self.shape.causal)


def make_role(
    shape: ModelShape,
    model: ModelConfig,
    engine: EngineConfig,
    ranks: Ranks,
    *,
    scalar: bool,
    trains: bool,
) -> Role:
    dtype = dtype_of(model, ranks.on_cpu)
    total = shape.scalar if scalar else shape.causal
    trained, adapters = total if trains else 0, 0
    if trains and model.lora.rank:
        adapters = adapter_parameters(shape, model.lora)
        trained = adapters + (shape.embed_dim if scalar else 0)
    made = engine_bytes(
        engine,
        dtype=dtype,
        world=ranks.world,
        total=total + adapters,
        trained=trained,
        largest=min(shape.largest, max(trained, 1)) if trains else shape.largest,
        on_cpu=ranks.on_cpu,
        hidden=shape.hidden,
    )
    return Role(shape, model, engine, dtype, scalar, trained, made)


def step_role(config: RunConfig, stage: Stage, shapes: Shapes, ranks: Ranks) -> Role:
    """The model of a stage that trains one, and its engine."""
    role = at(config, stage.models[0])
    shape = shapes.reward if stage.scalar else shapes.actor
    return make_role(shape, role.model, role.engine, ranks, scalar=stage.scalar, trains=True)


def ppo_roles(config: RunConfig, shapes: Shapes, ranks: Ranks) -> dict[str, Role]:
    """The models of step 3 and their engines."""
    rl = config.step3
    judge = shapes.reward if rl.uses_reward_model else shapes.actor  # what the critic starts from
    roles = {
        "actor": make_role(shapes.actor, rl.actor.model, rl.actor.engine, ranks,
                           scalar=False, trains=True),
        "reference": make_role(shapes.actor, rl.actor.model, rl.reference_engine, ranks,
                               scalar=False, trains=False),
    }  # fmt: skip
    if rl.uses_reward_model:
        roles["reward"] = make_role(
            judge, rl.critic.model, rl.reference_engine, ranks, scalar=True, trains=False
        )
    if NEEDS_CRITIC[rl.algorithm]:
        roles["critic"] = make_role(
            judge, rl.critic.model, rl.critic.engine, ranks, scalar=True, trains=True
        )
    return roles


def shares_base(config: RunConfig, *, on_cpu: bool) -> bool:
    """Will the four models share one base? As step3_ppo/roles.py asks `why_not_shared` in
    rlhf/models/shared.py, as far as settings tell: whether the reward model was trained on the same
    base is in its files, and here in step 2's settings."""
    rl, judge = config.step3, config.step2.model
    actor, critic = rl.actor, rl.critic
    if rl.share_base is False or not actor.model.lora.rank or not rl.uses_reward_model:
        return False
    if NEEDS_CRITIC[rl.algorithm] and (not critic.model.lora.rank or critic.model.name):
        return False
    if dtype_of(actor.model, on_cpu) != dtype_of(critic.model, on_cpu):
        return False
    engines = (actor.engine, critic.engine, rl.reference_engine)
    if any(engine.zero_stage == 3 or engine.deepspeed_config for engine in engines):
        return False
    return rl.rollout.engine != "hybrid" and judge.lora.rank > 0 and judge.name is None
