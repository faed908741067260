"""`--from RUN`: another run's frozen configuration is the recipe, its artifacts are the parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.finished import finished
from launch.runs import find_run, model_place, name_of, states
from rlhf.config.keys import leaves
from rlhf.config.migrate import migrated
from rlhf.config.trees import flatten
from rlhf.errors import ArtifactError, ConfigError, RequirementError
from rlhf.store import RunDir, read_json, read_manifest

_STEP_OF = {"sft": 1, "reward": 2}
_NAMES = {"sft": "SFT model", "reward": "reward model"}
# The run's own, or decided anew on each machine.
_NOT_TAKEN = ("name", "output_dir", "schema_version", "launch.keep_memory")


@dataclass(frozen=True)
class Source:
    """What a new run takes from another one."""

    run: RunDir
    settings: dict[str, Any]
    """Dotted name -> value."""
    models: dict[str, str]
    """"sft" and "reward": the place of each that the new run's steps build on and do not make."""


def read_source(given: str, roles: Sequence[str]) -> Source:
    """`roles`: the models that are needed and not given otherwise.

    Raises RequirementError (no such run, no settings, a model that it has not made), ArtifactError.
    """
    run = find_run(given, "--from")
    found = {role: model_of(run, role) for role in roles}
    if len(found) == len(_STEP_OF):
        check_descent(given, found)
    return Source(run, frozen_settings(run), found)


def needed(steps: Sequence[int]) -> list[str]:
    """The models that these steps build on and do not make."""
    return [role for role, maker in _STEP_OF.items() if maker not in steps and max(steps) > maker]


def frozen_settings(run: RunDir) -> dict[str, Any]:
    """Each step's settings as its processes had them; those of no step from the latest.

    Settings of no step that have their default are left out. Raises RequirementError.
    """
    settings: dict[str, Any] = {}
    for step in (1, 2, 3):
        flat = _settings_of(run, step)
        if flat is None:
            continue
        own = {name: value for name, value in flat.items() if name.startswith(f"step{step}.")}
        settings = {**flat, **_of_steps(settings, step), **own}
    if not settings:
        raise RequirementError(
            f"--from {run.path}: no step of it has written its settings down (resolved.json, "
            "MANIFEST.json): name another run"
        )
    return {
        name: value
        for name, value in settings.items()
        if name not in _NOT_TAKEN and (name.startswith("step") or value != _default(name))
    }


def _of_steps(settings: Mapping[str, Any], before: int) -> dict[str, Any]:
    """The settings of the steps before this one."""
    starts = tuple(f"step{step}." for step in range(1, before))
    return {name: value for name, value in settings.items() if starts and name.startswith(starts)}


def _settings_of(run: RunDir, step: int) -> dict[str, Any] | None:
    manifest = finished(run, step)
    if manifest is not None:
        return migrated(flatten(manifest.config), manifest.schema_version)
    try:
        config = dict(read_json(run.resolved(step)))["config"]
        return migrated(flatten(config), int(config.get("schema_version", 0)))
    except (RequirementError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _default(name: str) -> Any:
    leaf = leaves().get(name)
    return leaf.default if leaf is not None else None


def model_of(run: RunDir, role: str) -> str:
    """Where the run's SFT or reward model is: made by it, else what its PPO was given.

    Raises RequirementError.
    """
    if place := model_place(run, role):
        return place
    step = _STEP_OF[role]
    state = next((one.line() for one in states(run) if one.step == step), "it was not asked for")
    raise RequirementError(
        f"--from {run.path}: it has no {_NAMES[role]} to start from ({name_of(step)}: "
        f"{state}): run step {step} too (--step {step} ...), or name another run"
    )


def _id(place: str) -> str | None:
    try:
        return read_manifest(place).id
    except ArtifactError:
        return None


def check_descent(given: str, models: Mapping[str, str]) -> None:
    """Raises ArtifactError where the run's SFT model was made again after its reward model."""
    sft = _id(models["sft"])
    try:
        above = read_manifest(models["reward"]).parents.get("sft")
    except ArtifactError:
        return  # no artifact of ours, or damaged: the gate says so
    if sft and above is not None and above.id and above.id != sft:
        raise ArtifactError(
            f"--from {given}: its reward model was trained from SFT model {above.id[:12]}, its SFT "
            f"model is {sft[:12]} now: train the reward model again (--step 2 3)"
        )


def refuse_what_contradicts(
    source: str, *, config: str | None, steps: Sequence[int] | None, named: bool
) -> None:
    """Raises ConfigError for flags that do not go with --from, or that it needs."""
    if config is not None:
        raise ConfigError(
            f"--from {source} --config {config}: the settings come from one of them: for the "
            "recipe with models of the run, give --actor-model and --reward-model"
        )
    if steps is None:
        raise ConfigError(
            f"--from {source}: say which steps run anew, with its models for the others: --step 3 "
            "for another PPO, --step 2 3 for another reward model too"
        )
    if not named:
        raise ConfigError(f"--from {source}: the new run needs a name of its own: --name NAME")
