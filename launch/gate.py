"""The stage gate: what a step builds on, and whether a step is already done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.options import Options
from rlhf.config.migrate import changes
from rlhf.config.names import absolute_if_local, is_path_like
from rlhf.config.resolve import decisive, needs_of, section_of
from rlhf.config.schema import ResolvedStep
from rlhf.config.trees import at, flatten
from rlhf.errors import ArtifactError, ConfigError, RequirementError
from rlhf.redact import redact_tree
from rlhf.stages import STAGES, Need, Stage, maker_of
from rlhf.store import MANIFEST, Manifest, RunDir, jsonable, read_json, read_manifest, verify
from rlhf.store.checkpoints import differences, newest, refusal

RECOVERY = "recovery.json"


@dataclass(frozen=True)
class Parent:
    """What a step builds on."""

    name: str
    path: str
    id: str | None = None
    """Its manifest's id; None for a foreign model, and for one that this run is about to make."""
    config: Mapping[str, Any] | None = None
    """The configuration in its manifest."""
    tokenizer: str | None = None
    """Fingerprint of its tokenizer, from its manifest."""
    here: bool = False
    """Made by this same command."""
    descends_from: str | None = None
    """For a reward model of this run: the id of the SFT model that it was trained from."""
    note: str = ""


Done = Mapping[str, Manifest | None]  # kind that this command makes -> its manifest, if it is done


def find_parents(options: Options, stage: Stage, done: Done) -> list[Parent]:
    """The stage's parents.

    Raises RequirementError or ArtifactError naming the command that makes what is missing.
    """
    found = [_find(options, stage, need, done) for need in needs_of(options.config, stage)]
    parents = {parent.name: parent for parent in found if parent is not None}
    if {"sft", "reward"} <= parents.keys():
        check_tokenizers(stage, parents["sft"], parents["reward"])
        check_descent(stage, parents["sft"], parents["reward"])
    return list(parents.values())


def check_tokenizers(stage: Stage, sft: Parent, reward: Parent) -> None:
    """Raises ArtifactError if actor and reward model would read different tokens."""
    if sft.tokenizer and reward.tokenizer and sft.tokenizer != reward.tokenizer:
        raise ArtifactError(
            f"{stage}: the reward artifact {reward.path} was trained with tokenizer "
            f"{reward.tokenizer[:8]}, the actor's ({sft.path}) is {sft.tokenizer[:8]}: retrain "
            "step 2 on this actor's tokenizer (--step 2 --force), or pass another --reward-model"
        )


def check_descent(stage: Stage, sft: Parent, reward: Parent) -> None:
    """Raises ArtifactError if one of this run's two models was replaced after the other was made,
    be it by another run's artifact that verifies by itself."""
    if sft.id and reward.descends_from and reward.descends_from != sft.id:
        raise ArtifactError(
            f"{stage}: the reward artifact {reward.path} was trained from SFT model "
            f"{reward.descends_from[:12]}, but {sft.path} is {sft.id[:12]}: one of them was made "
            "again or is another run's. Make step 2 again (--step 2 3), or start a run with "
            "models of your own (--name, --actor-model, --reward-model)"
        )


def _find(options: Options, stage: Stage, need: Need, done: Done) -> Parent | None:
    kind, maker = need.kind, maker_of(need.kind)
    own = at(options.config, need.named_by) if need.named_by else None
    flag = options.models.get(maker.model_flag)
    path = options.run.artifact(kind)
    if own:
        return foreign(kind, own, need.named_by, options.dry_run)
    if kind in done:
        manifest = done[kind]
        if manifest is None:
            return Parent(kind, str(path), here=True)
        return _own(kind, path, manifest)
    if options.run.step_dir(maker).exists():
        return _from_run(options, stage, kind, flag)
    if flag:
        taken = options.source is not None and options.source.models.get(kind) == flag
        return foreign(kind, flag, "--from" if taken else maker.model_flag, options.dry_run)
    if need.spared_by and (
        options.models.get(stage.model_flag) or at(options.config, need.spared_by)
    ):
        return None
    instead = f"\nor give a model of your own with {maker.model_flag} (HF directory or hub id)"
    raise RequirementError(
        f"{stage} builds on {maker}'s {maker.title.removesuffix(' model')} model, and "
        f"{options.run.path} has none. Make it with:\n  {options.command(maker)}"
        f"{instead if maker.model_flag else ''}"
    )


def _from_run(options: Options, stage: Stage, kind: str, flag: str | None) -> Parent:
    maker = maker_of(kind)
    path = options.run.artifact(kind)
    try:
        manifest = prove(path, kind, quick=options.dry_run)
    except ArtifactError as error:
        instead = (
            f"\nor, to use a model of your own, start a new run (--name) with {maker.model_flag}"
        )
        raise ArtifactError(
            f"{stage} builds on {maker}: {error}\nMake it with:\n  {options.command(maker)}"
            f"{instead if maker.model_flag else ''}"
        ) from error
    note = ""
    above = manifest.parents.get("sft")
    base = flatten(manifest.config).get(maker.base)
    if flag and flag != base:
        note = f"{maker.model_flag} {flag} is not used: {maker}'s artifact (from {base}) is"
    found = _own(kind, path, manifest, note)
    return replace(found, descends_from=above.id if above else None)


def _own(name: str, path: Path, manifest: Manifest, note: str = "") -> Parent:
    tokenizer = manifest.tokenizer_fingerprint
    return Parent(name, str(path), manifest.id, manifest.config, tokenizer, note=note)


def foreign(name: str, model: str, setting: str, quick: bool) -> Parent:
    """A model that this run did not make: an artifact of another run, HF directory or hub id."""
    model = absolute_if_local(model)
    role = maker_of(name).title.removesuffix(" model")
    note = f"{setting}: {model} serves as the {role} model"
    path = Path(model)
    if not path.exists():
        if is_path_like(model):
            raise RequirementError(f"{setting} {model}: no such file or directory. Check the path")
        return Parent(name, model, note=note)
    if (path / MANIFEST).is_file():
        manifest = prove(path, None, quick)
        if manifest.kind not in (name, "base"):
            stages = [stage for stage in STAGES.values() if stage.makes == manifest.kind]
            parts = [part for stage in stages for part in stage.parts]
            hint = f"; give its part, {path / parts[0]}" if parts else ""
            raise ArtifactError(
                f"{setting} {model}: this is a {manifest.kind!r} artifact, a {name!r} artifact is "
                f"needed{hint}"
            )
        return _own(name, path, manifest, note)
    kinds = ("config.json", "adapter_config.json", "*.gguf")  # an adapter: the checks refuse it
    if path.is_dir() and not any(list(path.glob(kind)) for kind in kinds):
        raise RequirementError(
            f"{setting} {model}: no model in this directory (no config.json): give a Hugging Face "
            "model directory, a .gguf file or a hub id"
        )
    return Parent(name, model, note=note)


def prove(path: Path, kind: str | None, quick: bool) -> Manifest:
    """The artifact's manifest, verified. `quick` (dry run): its files are not read.

    Raises ArtifactError.
    """
    if not quick:
        return verify(path, kind)
    manifest = read_manifest(path)
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path}: this is a {manifest.kind!r} artifact, not {kind!r}")
    return manifest


def finished_step(
    options: Options, resolved: ResolvedStep, parents: list[Parent]
) -> tuple[Manifest | None, str]:
    """(the manifest of the step's artifact, why it would be made again).

    No manifest: there is no artifact, or (with a reason) one that does not verify. A manifest and
    no reason: the step is done, nothing of it would change.
    """
    stage = resolved.row
    artifact = options.run.artifact(stage.makes)
    if not artifact.exists():
        return None, ""
    try:
        manifest = prove(artifact, stage.makes, quick=options.dry_run)
    except ArtifactError as error:
        return None, f"its artifact does not verify ({error})"
    if options.force:
        return manifest, "--force"
    for parent in parents:
        if parent.here:
            return manifest, f"{maker_of(parent.name)} runs again"
        was = manifest.parents.get(parent.name)
        if was is None or was.id != parent.id or (parent.id is None and was.path != parent.path):
            return manifest, f"its {parent.name} parent is another one now"
    before = flatten(section_of(manifest.config, stage))
    now = flatten(section_of(redact_tree(jsonable(resolved.config)), stage))
    changed = changes(before, now, manifest.schema_version)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return manifest, f"settings changed: {', '.join(changed[:3])}{more}"
    return manifest, ""


def unfinished(options: Options, resolved: ResolvedStep, parents: list[Parent]) -> str:
    """The checkpoint that the step goes on from; "" if there is none.

    Raises ConfigError if it was made with other settings or parents. That it is whole is proven by
    the step itself.
    """
    found = newest(options.run.resume(resolved.row))
    if found is None:
        return ""
    place, record = found
    fatal, changed = differences(
        record,
        settings=redact_tree(decisive(jsonable(resolved.config), resolved.row)),
        parents={parent.name: parent.id or parent.path for parent in parents},
    )
    fatal += [f"{maker_of(p.name)} runs again first" for p in parents if p.here]
    if resolved.config.checkpoint.resume == "always":
        changed = []
    if problem := refusal(place, fatal, changed):
        raise ConfigError(problem)
    was, now = record.world_size, resolved.world_size
    other = "" if was == now else f", by {was} process{'es' if was > 1 else ''}: {now} now"
    return f"{place.name} (saved {record.created}{other})"


def recovery_scale(run: RunDir, stage: Stage) -> float:
    """What learning rates are multiplied by since the step diverged; 1 if it did not."""
    place = run.resume(stage) / RECOVERY
    if not place.exists():
        return 1.0
    try:
        return float(read_json(place)["learning_rate_scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{place}: damaged; delete it, or start the step again: --resume never"
        ) from error


def base_models(options: Options) -> dict[str, Any]:
    """The settings that --actor-model and --reward-model make: what the stages that run here start
    from. Raises ConfigError where one has nothing to start from."""
    changes: dict[str, Any] = {}
    for stage in options.pipeline:
        model = options.models.get(stage.model_flag)
        asked = stage in options.stages
        if model and (asked or options.run.step_dir(stage).exists()):
            changes[stage.base] = model
        if asked and stage.base and not (stage.needs or model or at(options.config, stage.base)):
            raise ConfigError(
                f"{stage} has no base model: give {stage.model_flag} (a hub id, directory, .gguf "
                f"file, or a bare size such as 1.3b), or set {stage.base} in the recipe"
            )
    return changes
