"""The stage gate: what a step builds on, and whether a step is already done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.options import Options
from rlhf.config.migrate import changes
from rlhf.config.names import absolute_if_local, is_path_like
from rlhf.config.resolve import decisive, parents_of, section_of
from rlhf.config.schema import ResolvedStep
from rlhf.config.trees import flatten
from rlhf.errors import ArtifactError, ConfigError, RequirementError
from rlhf.redact import redact_tree
from rlhf.store import MANIFEST, Manifest, RunDir, jsonable, read_json, read_manifest, verify
from rlhf.store.checkpoints import differences, newest, refusal

KINDS = {1: "sft", 2: "reward", 3: "ppo"}
STEP_NAMES = {1: "SFT", 2: "reward model", 3: "PPO"}
_MADE_BY = {"sft": 1, "reward": 2}
RECOVERY = "recovery.json"
_MODEL_FLAG = {"sft": "--actor-model", "reward": "--reward-model"}


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


def find_parents(options: Options, step: int, done: Mapping[int, Manifest | None]) -> list[Parent]:
    """The step's parents. `done`: asked-for step -> its manifest if it is already done.

    Raises RequirementError or ArtifactError naming the command that makes what is missing.
    """
    names = parents_of(options.config, step)
    found = [_find(options, step, name, done) for name in names]
    parents = [parent for parent in found if parent is not None]
    if step == 3 and len(parents) == 2:
        check_tokenizers(*parents)
        check_descent(*parents)
    return parents


def check_tokenizers(sft: Parent, reward: Parent) -> None:
    """Raises ArtifactError if actor and reward model would read different tokens."""
    if sft.tokenizer and reward.tokenizer and sft.tokenizer != reward.tokenizer:
        raise ArtifactError(
            f"step 3: the reward artifact {reward.path} was trained with tokenizer "
            f"{reward.tokenizer[:8]}, the actor's ({sft.path}) is {sft.tokenizer[:8]}: retrain "
            "step 2 on this actor's tokenizer (--step 2 --force), or pass another --reward-model"
        )


def check_descent(sft: Parent, reward: Parent) -> None:
    """Raises ArtifactError if one of this run's two models was replaced after the other was made,
    be it by another run's artifact that verifies by itself."""
    if sft.id and reward.descends_from and reward.descends_from != sft.id:
        raise ArtifactError(
            f"step 3: the reward artifact {reward.path} was trained from SFT model "
            f"{reward.descends_from[:12]}, but {sft.path} is {sft.id[:12]}: one of them was made "
            "again or is another run's. Make step 2 again (--step 2 3), or start a run with "
            "models of your own (--name, --actor-model, --reward-model)"
        )


def _find(
    options: Options, step: int, name: str, done: Mapping[int, Manifest | None]
) -> Parent | None:
    maker = _MADE_BY[name]
    own = options.config.step3.actor.model.name if step == 3 and name == "sft" else None
    flag = options.actor_model if name == "sft" else options.reward_model
    path = options.run.artifact(name)
    if own:
        return foreign(name, own, "step3.actor.model.name", options.dry_run)
    if maker in done:
        manifest = done[maker]
        if manifest is None:
            return Parent(name, str(path), here=True)
        return _own(name, path, manifest)
    if options.run.step_dir(maker).exists():
        return _from_run(options, step, name, flag)
    if flag:
        return foreign(name, flag, _MODEL_FLAG[name], options.dry_run)
    if step == 2 and (options.reward_model or options.config.step2.model.name):
        return None
    raise RequirementError(
        f"step {step} builds on step {maker}'s {STEP_NAMES[maker]} model, and {options.run.path} "
        f"has none. Make it with:\n  {options.command(maker)}\n"
        f"or give a model of your own with {_MODEL_FLAG[name]} (HF directory or hub id)"
    )


def _from_run(options: Options, step: int, name: str, flag: str | None) -> Parent:
    maker = _MADE_BY[name]
    path = options.run.artifact(name)
    try:
        manifest = prove(path, name, quick=options.dry_run)
    except ArtifactError as error:
        raise ArtifactError(
            f"step {step} builds on step {maker}: {error}\n"
            f"Make it with:\n  {options.command(maker)}\n"
            f"or, to use a model of your own, start a new run (--name) with {_MODEL_FLAG[name]}"
        ) from error
    note = ""
    above = manifest.parents.get("sft")
    base = flatten(manifest.config).get(f"step{maker}.model.name")
    if flag and flag != base:
        note = f"{_MODEL_FLAG[name]} {flag} is not used: step {maker}'s artifact (from {base}) is"
    found = _own(name, path, manifest, note)
    return replace(found, descends_from=above.id if above and name == "reward" else None)


def _own(name: str, path: Path, manifest: Manifest, note: str = "") -> Parent:
    tokenizer = manifest.tokenizer_fingerprint
    return Parent(name, str(path), manifest.id, manifest.config, tokenizer, note=note)


def foreign(name: str, model: str, setting: str, quick: bool) -> Parent:
    """A model that this run did not make: an artifact of another run, HF directory or hub id."""
    model = absolute_if_local(model)
    role = STEP_NAMES[_MADE_BY[name]].removesuffix(" model")
    note = f"{setting}: {model} serves as the {role} model"
    path = Path(model)
    if not path.exists():
        if is_path_like(model):
            raise RequirementError(f"{setting} {model}: no such file or directory. Check the path")
        return Parent(name, model, note=note)
    if (path / MANIFEST).is_file():
        manifest = prove(path, None, quick)
        part_of_ppo = manifest.kind == "ppo"
        if manifest.kind not in (name, "base") or part_of_ppo:
            hint = f"; give its part, {path / 'actor'}" if part_of_ppo else ""
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
    step = resolved.step
    artifact = options.run.step_dir(step) / "artifact"
    if not artifact.exists():
        return None, ""
    try:
        manifest = prove(artifact, KINDS[step], quick=options.dry_run)
    except ArtifactError as error:
        return None, f"its artifact does not verify ({error})"
    if options.force:
        return manifest, "--force"
    for parent in parents:
        if parent.here:
            return manifest, f"step {_MADE_BY[parent.name]} runs again"
        was = manifest.parents.get(parent.name)
        if was is None or was.id != parent.id or (parent.id is None and was.path != parent.path):
            return manifest, f"its {parent.name} parent is another one now"
    before = flatten(section_of(manifest.config, step))
    now = flatten(section_of(redact_tree(jsonable(resolved.config)), step))
    changed = changes(before, now, manifest.schema_version)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return manifest, f"settings changed: {', '.join(changed[:3])}{more}"
    return manifest, ""


def unfinished(options: Options, resolved: ResolvedStep, parents: list[Parent]) -> str:
    """The checkpoint that the step goes on from; "" if there is none.

    Raises ConfigError if it was made with other settings, parents or processes. That it is whole
    is proven by the step itself.
    """
    found = newest(options.run.resume(resolved.step))
    if found is None:
        return ""
    place, record = found
    fatal, changed = differences(
        record,
        settings=redact_tree(decisive(jsonable(resolved.config), resolved.step)),
        parents={parent.name: parent.id or parent.path for parent in parents},
        world_size=resolved.world_size,
    )
    fatal += [f"step {_MADE_BY[p.name]} runs again first" for p in parents if p.here]
    if resolved.config.checkpoint.resume == "always":
        changed = []
    if problem := refusal(place, fatal, changed):
        raise ConfigError(problem)
    return f"{place.name} (saved {record.created})"


def recovery_scale(run: RunDir, step: int) -> float:
    """What learning rates are multiplied by since the step diverged; 1 if it did not."""
    place = run.resume(step) / RECOVERY
    if not place.exists():
        return 1.0
    try:
        return float(read_json(place)["learning_rate_scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{place}: damaged; delete it, or start the step again: --resume never"
        ) from error


def base_models(options: Options) -> dict[str, Any]:
    """The settings that --actor-model and --reward-model make: the bases of steps 1 and 2."""
    changes: dict[str, Any] = {}
    for step, model in ((1, options.actor_model), (2, options.reward_model)):
        in_run = step in options.steps or options.run.step_dir(step).exists()
        if model and in_run:
            changes[f"step{step}.model.name"] = model
    if 1 in options.steps and not (options.actor_model or options.config.step1.model.name):
        raise ConfigError(
            "step 1 has no base model: give --actor-model (a hub id, directory, .gguf file, or a "
            "bare size such as 1.3b), or set step1.model.name in the recipe"
        )
    return changes
