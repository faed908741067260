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
from rlhf.stages import REWARD, SFT, STAGES, Stage, maker_of
from rlhf.store import RunDir, read_json, read_manifest

_MAKERS = (SFT, REWARD)  # of the models that a run can take from another one
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
    if len(found) == len(_MAKERS):
        check_descent(given, found)
    return Source(run, frozen_settings(run), found)


def needed(numbers: Sequence[int]) -> list[str]:
    """The models that the stages of these numbers build on and do not make."""
    return [
        maker.makes
        for maker in _MAKERS
        if maker.number not in numbers and max(numbers, default=0) > maker.number
    ]


def frozen_settings(run: RunDir) -> dict[str, Any]:
    """Each step's settings as its processes had them; those of no step from the latest.

    Settings of no step that have their default are left out. Raises RequirementError.
    """
    settings: dict[str, Any] = {}
    seen: list[str] = []
    for stage in STAGES.values():
        flat = _settings_of(run, stage)
        if flat is None:
            continue
        own, earlier = _of_sections(flat, [stage.section]), _of_sections(settings, seen)
        settings = {**flat, **earlier, **own}
        seen.append(stage.section)
    if not settings:
        raise RequirementError(
            f"--from {run.path}: no step of it has written its settings down (resolved.json, "
            "MANIFEST.json): name another run"
        )
    sections = {stage.section for stage in STAGES.values()}
    return {
        name: value
        for name, value in settings.items()
        if name not in _NOT_TAKEN and (name.split(".")[0] in sections or value != _default(name))
    }


def _of_sections(settings: Mapping[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name.split(".")[0] in sections}


def _settings_of(run: RunDir, stage: Stage) -> dict[str, Any] | None:
    manifest = finished(run, stage)
    if manifest is not None:
        return migrated(flatten(manifest.config), manifest.schema_version)
    try:
        config = dict(read_json(run.resolved(stage)))["config"]
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
    stage = maker_of(role)
    state = next((one.line() for one in states(run) if one.stage is stage), "it was not asked for")
    what = f"{stage.title.removesuffix(' model')} model"
    raise RequirementError(
        f"--from {run.path}: it has no {what} to start from ({name_of(stage)}: {state}): "
        f"run {stage} too (--step {stage.number} ...), or name another run"
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
