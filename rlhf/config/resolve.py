"""What one step's processes get: inherited values filled in, paths absolute, batches that fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config.load import MODEL_NAMES, flatten, nest, with_values
from rlhf.config.migrate import SCHEMA_VERSION
from rlhf.config.names import absolute_if_local
from rlhf.config.rewards import described
from rlhf.config.schema import ResolvedStep, RunConfig
from rlhf.config.trees import at
from rlhf.errors import ConfigError
from rlhf.redact import HIDDEN_SETTINGS, first_redacted
from rlhf.stages import REWARD, Need, Stage, get, maker_of, pipeline_of


def needs_of(config: RunConfig, stage: Stage) -> list[Need]:
    """The artifacts that a stage builds on with these settings."""
    return [need for need in stage.needs if not need.when or at(config, need.when)]


def without_unneeded(config: RunConfig, pipeline: Sequence[Stage]) -> list[Stage]:
    """A pipeline that was not asked for by name, without a reward model that no stage reads."""
    needed = {need.kind for stage in pipeline for need in needs_of(config, stage)}
    given = "pipeline" in config.model_fields_set
    return [s for s in pipeline if given or s is not REWARD or s.makes in needed]


def refuse_unread(reward_model: str, config: RunConfig, stages: Sequence[Stage]) -> None:
    """Raises ConfigError for a --reward-model that no stage would read."""
    pipeline = pipeline_of(config.pipeline)
    read = {need.kind for stage in pipeline for need in stage.needs}
    if REWARD not in pipeline and REWARD.makes not in read:
        why = f"the pipeline is {', '.join(config.pipeline)}. Leave the flag out"
    elif REWARD not in stages and not config.step3.uses_reward_model:
        told = described(config.step3.rewards)
        why = f"step3.rewards is {told}. Add the term `model` to it, or leave the flag out"
    else:
        return
    raise ConfigError(f"--reward-model {reward_model}: nothing would read it: {why}")


def resolve_step(
    config: RunConfig,
    step: Stage | str | int,
    *,
    run_dir: Path,
    world_size: int = 1,
    parents: Mapping[str, str] | None = None,
    parent_configs: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> ResolvedStep:
    """The step's `resolved.json`.

    `parents`: `sft`, `reward` -> directory or hub id; `parent_configs`: the configuration in the
    parent's manifest, absent where it is made by this same run or is a foreign model.
    Raises ConfigError: a relation does not hold, a batch does not fit.
    """
    stage = get(step)
    parents = dict(parents or {})
    refuse_redacted(config)
    config = absolute_paths(config)
    changes, inherited = inherit(config, stage, parent_configs or {})
    try:
        config = with_values(config, changes)
    except ConfigError as error:
        lines = [f"{key} = {changes[key]!r} (inherited from {inherited[key]})" for key in inherited]
        raise ConfigError(f"{error}; {', '.join(lines)}: set it for {stage} too") from None
    check_batches(config, stage, world_size)
    return ResolvedStep(
        step=stage.number,
        stage=stage.name,
        schema_version=SCHEMA_VERSION,
        run_dir=str(run_dir.absolute()),
        world_size=world_size,
        parents=parents,
        inherited=inherited,
        config=config,
    )


def refuse_redacted(config: RunConfig) -> None:
    """Raises ConfigError for a setting whose secret was taken out when it was written down."""
    if name := first_redacted(config.model_dump()):
        raise ConfigError(
            f"{name} = {at(config, name)!r} has a secret in it that was not written down: give "
            f"the real value (--{name} VALUE), or start the step through train.py, which passes "
            f"it on in the environment ({HIDDEN_SETTINGS}; on other hosts set that yourself)"
        )


def inherit(
    config: RunConfig, stage: Stage, parent_configs: Mapping[str, Mapping[str, Any] | None]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(dotted key -> value, dotted key -> where from) of what the step leaves unset."""
    given = flatten(config.model_dump(exclude_unset=True))
    own = flatten(config.model_dump())
    changes: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, (parent, source) in stage.inherits.items():
        if given.get(key) is not None:
            continue
        manifest = flatten(parent_configs.get(parent) or {})
        changes[key] = manifest.get(source, own[source])
        if key == source and changes[key] == own[source]:
            continue
        # A foreign model has no settings of ours: the run's own section for that step stands in.
        maker = str(maker_of(parent))
        ours = maker if parent in parent_configs else f"the {maker} section"
        origins[key] = ours
    return changes, origins


def describe_inherited(resolved: ResolvedStep) -> list[str]:
    """Lines like `step2.max_length = 512 (inherited from step 1)`; the models included."""
    flat = flatten(resolved.config.model_dump())
    lines = [f"{key} = {flat[key]} (inherited from {o})" for key, o in resolved.inherited.items()]
    for key, parent in resolved.row.model_from.items():
        if flat[key] is None and parent in resolved.parents:
            lines.append(f"{key} = {resolved.parents[parent]} (inherited from {maker_of(parent)})")
    return lines


def absolute_paths(config: RunConfig) -> RunConfig:
    """Local names become absolute: the step's processes may start in another directory."""
    flat = flatten(config.model_dump(exclude_unset=True))
    changes: dict[str, Any] = {}
    for name in MODEL_NAMES:
        if value := flat.get(name):
            changes[name] = absolute_if_local(value)
    changes["data.path"] = [absolute_if_local(path) for path in config.data.path]
    for name, value in flat.items():
        files = ("deepspeed_config", "nvme_path", "hostfile", "accelerate_config")
        is_file = name.rsplit(".", 1)[-1] in files
        if value and (is_file or name in ("data.cache_dir", "output_dir")):
            changes[name] = str(Path(value).expanduser().absolute())
    return with_values(config, changes)


def check_batches(config: RunConfig, stage: Stage, world_size: int) -> None:
    """Refuses batches that do not divide over the processes. Raises ConfigError."""
    _divides(stage.batch, at(config, stage.batch), world_size)
    if stage.generates:
        rollout, ppo = config.step3.rollout, config.step3.ppo
        rows = rollout.prompts * rollout.samples_per_prompt // ppo.minibatches
        what = "answers per PPO minibatch (prompts x samples_per_prompt / minibatches)"
        if rows % world_size:
            raise ConfigError(
                f"{stage}: {rows} {what} do not divide over {world_size} processes. Change "
                f"step3.ppo.minibatches = {ppo.minibatches}, or use --num-gpus with a divisor"
            )


def _divides(key: str, rows: int, world_size: int) -> None:
    if rows % world_size == 0:
        return
    below, above = rows // world_size * world_size, math.ceil(rows / world_size) * world_size
    choices = " or ".join(str(choice) for choice in (below, above) if choice)
    raise ConfigError(
        f"{key} = {rows} counts the rows of all {world_size} processes and must be a multiple of "
        f"{world_size}: use {key}={choices}, or another --num-gpus"
    )


def accumulation(config: RunConfig, stage: Stage, world_size: int) -> int:
    """Forward passes per rank and optimiser step: rows / processes / micro-batch, rounded up."""
    return math.ceil(rows_per_step(config, stage) / world_size / at(config, stage.micro_batch))


def rows_per_step(config: RunConfig, stage: Stage) -> int:
    """Rows of one optimiser step over all ranks."""
    rows = int(at(config, stage.batch))
    if stage.generates:
        rows = rows * config.step3.rollout.samples_per_prompt // config.step3.ppo.minibatches
    return rows


def section_of(config: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """What of a configuration decides a step's result: its own section, the data and the seed."""
    flat = flatten({key: config.get(key, {}) for key in (stage.section, "data", "seed")})
    flat.pop("data.cache_dir", None)
    flat = {name: v for name, v in flat.items() if not name.startswith("data.limits.")}
    if not stage.generates:  # what only rewards read
        flat.pop("data.keep_columns", None)
    # How a trained policy is evaluated is no part of it, and evaluation can be repeated.
    return nest({key: v for key, v in flat.items() if not key.startswith(f"{stage.section}.eval.")})


# Settings of a step's own section that change what is printed, or rounding, but not the result.
_NOT_DECISIVE = (
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.eval_batch_size",
    "train.eval_every",
    "train.log_every",
    "micro_batch_size",
    "micro_batch_tokens",
    "rollout.gather",
    "log_every",
)
# Shards are converted when a checkpoint is read.
_ANYWHERE = "engine.zero_stage"


def decisive(config: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """Dotted name -> value, of the settings that must be the same to go on from a checkpoint."""
    left_out = {f"{stage.section}.{name}" for name in _NOT_DECISIVE}
    flat = flatten(section_of(config, stage))
    return {
        name: value
        for name, value in flat.items()
        if name not in left_out and not name.endswith(_ANYWHERE)
    }
