"""Runs set side by side: what each was made with, what came of it, and the same prompts' answers.

Figures are paired only where they mean the same: rewards of one reward model, KL from one SFT
model, points of one judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.finished import finished
from launch.runs import find_run
from rlhf.config.keys import leaves
from rlhf.config.migrate import migrated
from rlhf.config.resolve import section_of
from rlhf.config.trees import flatten
from rlhf.errors import ArtifactError, ConfigError, RequirementError
from rlhf.evaluation.answers import AnswerRecord, columns, prompt_keys
from rlhf.evaluation.compare import Comparison, compare, compared
from rlhf.evaluation.intervals import mean_interval
from rlhf.evaluation.published import verdict_of
from rlhf.stages import PPO, STAGES, Stage
from rlhf.store import MANIFEST, Manifest, RunDir, read_json, read_manifest
from rlhf.store.manifest import ParentRecord


@dataclass(frozen=True)
class Side:
    """A run that is compared."""

    name: str
    run: RunDir
    manifests: dict[Stage, Manifest] = field(default_factory=dict)
    """Stage -> the artifact that the run made or that its PPO was given."""
    missing: list[str] = field(default_factory=list)
    """What cannot be known, and why."""

    @cached_property
    def verdict(self) -> dict[str, Any] | None:
        try:
            return verdict_of(self.run)
        except (RequirementError, ArtifactError):
            return None

    @cached_property
    def answers(self) -> list[AnswerRecord]:
        """The policy's, to held-out prompts; [] without a verdict."""
        path = self.run.artifact("evaluation") / "answers.jsonl"
        if self.verdict is None or not path.is_file():
            return []
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            AnswerRecord.from_json({key: value for key, value in row.items() if key != "model"})
            for row in rows
            if row["model"] == "ppo"
        ]

    def settings(self, stage: Stage) -> dict[str, Any] | None:
        """What decided a stage's result, by dotted name; None where the stage is not known."""
        if stage in self.manifests:
            manifest = self.manifests[stage]
            config, version = manifest.config, manifest.schema_version
        else:
            try:
                config = dict(read_json(self.run.resolved(stage)))["config"]
            except (RequirementError, OSError, ValueError, KeyError, TypeError):
                return None
            version = int(config.get("schema_version", 0))
        flat = flatten(section_of(config, stage))
        if stage.evaluates:
            asked = f"{stage.section}.eval."
            flat |= {k: v for k, v in flatten(config).items() if k.startswith(asked)}
        return migrated(flat, version)

    def made_from(self, role: str) -> str | None:
        """Which SFT or reward model the policy was trained with: its content, else its name."""
        policy = self.manifests.get(PPO)
        parent = policy.parents.get(role) if policy else None
        if parent is None:
            return None
        manifest = _parent_manifest(self.run, role, parent)
        return manifest.content_id if manifest else parent.id or parent.path


def side(given: str) -> Side:
    """Raises RequirementError: no such run."""
    run = find_run(given, "compare")
    found: dict[Stage, Manifest] = {}
    missing: list[str] = []
    policy = finished(run, PPO)
    for stage in STAGES.values():
        manifest = finished(run, stage)
        if manifest is None and policy is not None:
            parent = policy.parents.get(stage.makes)
            manifest = _parent_manifest(run, stage.makes, parent) if parent else None
        if manifest is not None:
            found[stage] = manifest
    made = Side(run.path.name, run, found, missing)
    try:
        verdict_of(run)
    except (RequirementError, ArtifactError) as error:
        missing.append(str(error))
    return made


def _parent_manifest(run: RunDir, role: str, parent: ParentRecord) -> Manifest | None:
    """The manifest of a parent, wherever its run is now; None where it is not there any more, or
    another one by now."""
    for place in (Path(parent.path), run.artifact(role)):
        if parent.id and (place / MANIFEST).is_file():
            try:
                manifest = read_manifest(place)
            except ArtifactError:
                continue
            if manifest.id == parent.id:
                return manifest
    return None


def sides(given: Sequence[str]) -> list[Side]:
    """Each with a name of its own. Raises RequirementError, ConfigError."""
    found = [side(one) for one in given]
    paths = [one.run.path.resolve() for one in found]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"rlhf compare {' '.join(given)}: one run is given twice")
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        found = [Side(str(one.run.path), one.run, one.manifests, one.missing) for one in found]
    return found


def differing(found: Sequence[Side]) -> tuple[dict[str, list[Any]], list[Stage]]:
    """(dotted name -> each side's value, of the settings that differ; the stages of which not all
    sides have settings). A setting that a record lacks has its default."""
    differ: dict[str, list[Any]] = {}
    incomplete = []
    for stage in STAGES.values():
        known = [one.settings(stage) for one in found]
        if any(one is None for one in known):
            if any(one is not None for one in known):
                incomplete.append(stage)
            continue
        flats = [one for one in known if one is not None]
        for name in sorted({name for flat in flats for name in flat}):
            values = [flat.get(name, _default(name)) for flat in flats]
            if any(value != values[0] for value in values):
                differ.setdefault(name, values)
    return differ, incomplete


def _default(name: str) -> Any:
    leaf = leaves().get(name)
    return leaf.default if leaf is not None else None


@dataclass(frozen=True)
class Pairing:
    """The policies of two runs on the prompts that both answered."""

    before: str
    after: str
    prompts: int
    figures: dict[str, Comparison]
    left_out: dict[str, str]
    """Figure -> why it is not compared."""


def pair(one: Side, two: Side) -> Pairing:
    """`two` against `one`, figure by figure; every interval is over prompts."""
    left_out: dict[str, str] = {}
    for side in (one, two):
        if not side.answers:
            left_out["all figures"] = f"{side.name} has no answers to held-out prompts"
    if left_out:
        return Pairing(one.name, two.name, 0, {}, left_out)
    before, after = same_prompts(one.answers, two.answers)
    prompts = len(set(prompt_keys(before)))
    if prompts < 2:
        left_out["all figures"] = f"they answered {prompts or 'no'} prompt in common"
        return Pairing(one.name, two.name, prompts, {}, left_out)
    figures = compare(before, after, lambda points: False)
    figures.pop("judge_good", None)  # which points are good is the judge's to say
    kl = [columns(some, None)["kl"] for some in (before, after)]
    change = mean_interval([b - a for a, b in zip(*(c.by_prompt for c in kl), strict=True)])
    figures["kl"] = compared(kl[0].interval.mean, kl[1].interval.mean, change, neutral=True)
    for reason, names in _unlike(one, two).items():
        for name in names:
            if figures.pop(name, None) is not None:
                left_out[name] = reason
    return Pairing(one.name, two.name, prompts, figures, left_out)


def _unlike(one: Side, two: Side) -> dict[str, tuple[str, ...]]:
    """Why -> figures that do not mean the same in both runs."""
    found: dict[str, tuple[str, ...]] = {}
    if one.made_from("reward") != two.made_from("reward"):
        found["scored by different reward models"] = ("reward", "reward_within_lengths")
    if one.made_from("sft") != two.made_from("sft"):
        found["measured from different SFT models"] = ("kl",)
    judges = [side.verdict.get("judge") if side.verdict else None for side in (one, two)]
    if judges[0] != judges[1]:
        found[f"judged by {judges[0]} and {judges[1]}"] = ("judge",)
    tokenizers = {side.manifests[PPO].tokenizer_fingerprint for side in (one, two)}
    if len(tokenizers) > 1:
        found["counted in different tokens"] = ("length", "distinct_2", "reward_within_lengths")
    return found


def same_prompts(
    one: Sequence[AnswerRecord], two: Sequence[AnswerRecord]
) -> tuple[list[AnswerRecord], list[AnswerRecord]]:
    """The answers to prompts that both answered, in one order, as many to a prompt in both."""
    grouped: list[Mapping[str, list[AnswerRecord]]] = [_by_prompt(one), _by_prompt(two)]
    before: list[AnswerRecord] = []
    after: list[AnswerRecord] = []
    for key, records in grouped[0].items():
        count = min(len(records), len(grouped[1].get(key, [])))
        before += records[:count]
        after += grouped[1].get(key, [])[:count]
    return before, after


def _by_prompt(records: Sequence[AnswerRecord]) -> dict[str, list[AnswerRecord]]:
    found: dict[str, list[AnswerRecord]] = {}
    for key, record in zip(prompt_keys(records), records, strict=True):
        found.setdefault(key, []).append(record)
    return found
