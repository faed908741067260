"""Bytes that a step writes below its run directory: its artifact, and checkpoints until then."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rlhf.config.schema import RunConfig
from rlhf.plan.roles import Ranks, Role, Shapes, ppo_roles, step_role
from rlhf.stages import Stage


@dataclass(frozen=True)
class StepDisk:
    """Over all ranks."""

    artifact: float
    """What is published: merged weights, and adapters apart."""
    checkpoint: float
    """One checkpoint: what trains, with its optimiser's state."""
    kept: int
    """Checkpoints there are at once: a new one is written before the oldest goes."""

    @property
    def checkpoints(self) -> float:
        return self.kept * self.checkpoint


def step_disk(config: RunConfig, stage: Stage, shapes: Shapes, ranks: Ranks) -> StepDisk:
    """`config` as the step gets it (`resolve_step`)."""
    kept = config.checkpoint.keep_last + 1
    if not stage.generates:
        role = step_role(config, stage, shapes, ranks)
        return StepDisk(published(role), saved(role), kept)
    roles = [role for role in ppo_roles(config, shapes, ranks).values() if role.trains]
    artifact, checkpoint = sum(map(published, roles)), sum(map(saved, roles))
    if config.step3.ppo.ema_decay:
        actor = roles[0]
        artifact += published(actor)
        shares = 1 if actor.stage == 3 else ranks.world
        checkpoint += 4.0 * actor.trained * shares
    return StepDisk(artifact, checkpoint, kept)


def needed(steps: Iterable[StepDisk]) -> float:
    """Bytes of the fullest moment: a step's checkpoints go when its artifact is there."""
    published_so_far, fullest = 0.0, 0.0
    for step in steps:
        published_so_far += step.artifact
        fullest = max(fullest, published_so_far + step.checkpoints)
    return fullest


def published(role: Role) -> float:
    """safetensors in the model's own dtype."""
    return role.whole + (role.size * role.trained if role.adapted else 0.0)


def saved(role: Role) -> float:
    """DeepSpeed's files: weights that train in the model's dtype, AdamW's two moments in fp32, and
    from stage 1 on an fp32 master copy; at stage 3 that copy stands for the weights."""
    per_parameter = {0: role.size + 8.0, 3: 12.0}.get(role.stage, role.size + 12.0)
    return per_parameter * role.trained
