"""What a model's files tell without loading it: is it one that a step can use?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.checks import BAD_SETTING, Check, of_error
from launch.plan import Plan, StepPlan
from rlhf.config.keys import nearest
from rlhf.config.names import is_hub_model, is_path_like
from rlhf.config.schema import ModelConfig, RunConfig
from rlhf.config.trees import at
from rlhf.errors import UserError
from rlhf.families import FAMILIES, TINY_FAMILIES
from rlhf.plan.classes import CAUSAL, SEQUENCE, families_with
from rlhf.plan.files import (
    TOKENIZERS,
    Fault,
    config_faults,
    tokenizer_faults,
    weight_faults,
)
from rlhf.plan.known import known_names
from rlhf.plan.read import is_known, read_config, snapshot
from rlhf.plan.roles import NEEDS_CRITIC
from rlhf.stages import Stage


@dataclass(frozen=True)
class Use:
    """A model by name, for one role in one step."""

    name: str
    role: str
    settings: ModelConfig
    table: str
    """transformers' table that must know its family."""
    longest: int
    """Tokens of the longest row."""
    length_setting: str
    ours: bool = False
    """An artifact of ours: whole, and of a family that has trained before."""
    kernels: bool = False
    """It is to answer through DeepSpeed's inference kernels."""


def check_models(plan: Plan) -> list[Check]:
    """A line for each model by name that a step is going to read."""
    by_name: dict[str, list[Use]] = {}
    for item in plan.steps:
        for use in _uses(plan, item) if not item.done else ():
            by_name.setdefault(use.name, []).append(use)
    checks: list[Check] = []
    for name, uses in by_name.items():
        found = list(_problems(name, uses))
        if not found and not uses[0].ours:
            roles = ", ".join(dict.fromkeys(use.role for use in uses))
            found = [Check(f"model {name}", "ok", f"can be {roles}")]
        checks += found
    return checks


def _uses(plan: Plan, item: StepPlan) -> Iterator[Use]:
    config = item.resolved.config
    parents = {parent.name: parent for parent in item.parents}
    bases = {"sft": config.step1.model.name, "reward": config.step2.model.name}
    bases["reward"] = bases["reward"] or bases["sft"]

    def parent(name: str) -> tuple[str | None, bool]:
        found = parents.get(name)
        if found is None or found.here:
            return bases.get(name), False
        return found.path, found.id is not None

    stage = item.stage
    if stage.generates:
        yield from _of_rollout(stage, config, parent)
        return
    section = at(config, stage.section)
    own = at(config, stage.base) if stage.base else None
    model = (own, False) if own or not stage.needs else parent(stage.needs[0].kind)
    longest = section.max_length or config.step1.max_length
    table = SEQUENCE if stage.scalar else CAUSAL
    key = f"{stage.section}.max_length"
    yield from _use(model, f"the base of {stage}", at(config, stage.model), table, longest, key)


def _of_rollout(
    stage: Stage, config: RunConfig, parent: Callable[[str], tuple[str | None, bool]]
) -> Iterator[Use]:
    rl, rollout = config.step3, config.step3.rollout
    longest = rollout.max_new_tokens
    longest += rollout.max_prompt_length or config.step1.max_prompt_length
    key = "step3.rollout.max_prompt_length + step3.rollout.max_new_tokens"
    policy, reward, critic = (f"{stage}'s {role}" for role in ("policy", "reward model", "critic"))
    kernels = rollout.engine == "hybrid" and rollout.hybrid_kernels
    for use in _use(parent("sft"), policy, rl.actor.model, CAUSAL, longest, key):
        yield replace(use, kernels=kernels)
    if rl.uses_reward_model:
        yield from _use(parent("reward"), reward, rl.critic.model, SEQUENCE, longest, key)
    starts = (rl.critic.model.name, False)
    if not (rl.uses_reward_model or rl.critic.model.name) and NEEDS_CRITIC[rl.algorithm]:
        starts = parent("sft")  # with a new head
    yield from _use(starts, critic, rl.critic.model, SEQUENCE, longest, key)


def _use(
    model: tuple[str | None, bool],
    role: str,
    settings: ModelConfig,
    table: str,
    longest: int,
    key: str,
) -> Iterator[Use]:
    if model[0]:
        yield Use(model[0], role, settings, table, longest, key, model[1])


def _problems(name: str, uses: list[Use]) -> Iterator[Check]:
    what, place = f"model {name}", Path(name).expanduser()
    if uses[0].ours:
        if (place / "config.json").is_file():
            config = read_config(name)
            yield from _positions(what, config, uses)
            yield from _kernels(what, config, uses)
        return
    if trouble := _bad_name(name, place):
        yield trouble
        return
    if is_hub_model(name) and not is_known(name):
        return  # the hub is asked about it
    adapter, whole = place / "adapter_config.json", place / "config.json"
    if adapter.is_file() and not whole.is_file():
        yield _adapter(what, adapter)
        return
    try:
        config = read_config(name)
    except UserError as error:
        yield of_error(what, error)
        return
    own_code = uses[0].settings.trust_remote_code
    faults = [_of_fault(what, one) for one in config_faults(config, own_code=own_code)]
    yield from faults or _kind(what, config, uses)
    if faults:
        return
    yield from _positions(what, config, uses)
    yield from _kernels(what, config, uses)
    if directory := place if place.is_dir() else snapshot(name):
        yield from _files(what, directory, config, whole=place.is_dir())


def _bad_name(name: str, place: Path) -> Check | None:
    """Names that can only be wrong, whatever there is on a hub."""
    what = f"model {name}"
    kind, colon, rest = name.partition(":")
    if kind == "tiny" and colon:
        if rest in TINY_FAMILIES:
            return None
        close = nearest(rest, TINY_FAMILIES)
        remedy = f"Did you mean tiny:{close[0]}?" if close else f"e.g. tiny:{TINY_FAMILIES[0]}"
        needed = f"one of tiny:{', tiny:'.join(TINY_FAMILIES)}"
        return Check(what, "FAIL", f"no tiny family {rest!r}", needed, remedy, BAD_SETTING)
    if kind == "package" or place.exists():
        return None
    if len(kind) == 1 and colon:
        remedy = "give the path as this system writes it, e.g. /mnt/c/models/x under WSL"
        return Check(what, "FAIL", "a Windows path, and no such file here", "", remedy)
    if colon:
        remedy = "models with a colon are tiny:FAMILY and package:NAME[/FILE.gguf]"
        return Check(what, "FAIL", f"{kind!r} is no kind of model", "", remedy, BAD_SETTING)
    if is_path_like(name) or not is_hub_model(name):
        remedy = "check --actor-model or --reward-model; a hub id looks like owner/name"
        found = f"no such file or directory (from {Path.cwd()})"
        return Check(what, "FAIL", found, "", remedy)
    if name.startswith("facebook/opt-") and not is_known(name):
        sizes = [known for known in known_names() if known.startswith("facebook/opt-")]
        close = nearest(name, sizes)
        remedy = f"Did you mean {close[0].removeprefix('facebook/opt-')}?" if close else ""
        names = ", ".join(size.removeprefix("facebook/opt-") for size in sizes)
        return Check(what, "FAIL", "no such size of OPT", f"one of {names}", remedy, BAD_SETTING)
    return None


def _adapter(what: str, file: Path) -> Check:
    try:
        base = json.loads(file.read_text(encoding="utf-8"))
        named = f" of {base['base_model_name_or_path']}"
    except (OSError, ValueError, KeyError, TypeError):
        named = ""
    return Check(
        what, "FAIL", f"an adapter{named} (adapter_config.json), no whole model",
        "config.json and weights", "merge it into its base (peft's merge_and_unload, then "
        "save_pretrained) and give that directory",
    )  # fmt: skip


def _kind(what: str, config: dict[str, Any], uses: list[Use]) -> Iterator[Check]:
    family = config.get("model_type")
    own_code = uses[0].settings.trust_remote_code and "auto_map" in config
    for use in uses:
        known = families_with(use.table)
        if known is None or own_code or family in known:
            continue
        kind = "causal language model" if use.table == CAUSAL else "sequence classification model"
        found = f"transformers has no {kind} of family {family!r}, which {use.role} needs"
        remedy = "take a decoder family (Llama, OPT, GPT-2, GPT-NeoX, Qwen, Gemma, Mistral ...)"
        if "auto_map" in config:
            remedy = "set model.trust_remote_code=true if you trust the code that it brings"
        yield Check(what, "FAIL", found, "", remedy)


def _positions(what: str, config: dict[str, Any], uses: list[Use]) -> Iterator[Check]:
    inner = config.get("text_config")
    inner = inner if isinstance(inner, dict) else config
    limit = inner.get("max_position_embeddings") or inner.get("n_positions")
    if not isinstance(limit, int):
        return
    for use in {use.length_setting: use for use in uses}.values():
        if use.longest > limit:
            found = f"rows of up to {use.longest} tokens ({use.length_setting}) for {use.role}"
            needed = f"at most its {limit} positions"
            remedy = f"lower {use.length_setting} to {limit}, or take a model with more positions"
            yield Check(what, "FAIL", found, needed, remedy, BAD_SETTING)


def _kernels(what: str, config: dict[str, Any], uses: list[Use]) -> Iterator[Check]:
    """With other families DeepSpeed's kernels end the process, or fail in the first forward."""
    family = FAMILIES.get(config.get("model_type", ""))
    if any(use.kernels for use in uses) and not (family and family.hybrid_kernels):
        able = ", ".join(name for name, known in FAMILIES.items() if known.hybrid_kernels)
        found = f"DeepSpeed's inference kernels fail for the family {config.get('model_type')!r}"
        remedy = "leave out step3.rollout.hybrid_kernels, or step3.rollout.engine=continuous"
        yield Check(what, "FAIL", found, f"one of {able} (docs/gpu.md)", remedy, BAD_SETTING)


def _files(what: str, place: Path, config: dict[str, Any], whole: bool) -> Iterator[Check]:
    """Weights and a tokenizer. `whole`: what is absent will not come from a hub."""
    for fault in (*tokenizer_faults(place, config), *weight_faults(place, config)):
        yield _of_fault(what, fault)
    if (
        not whole
        or any((place / name).is_file() for name in TOKENIZERS)
        or any(place.glob("*.gguf"))
    ):
        return
    needed = f"one of {', '.join(TOKENIZERS)}"
    remedy = "copy the tokenizer's files beside the weights"
    yield Check(what, "FAIL", "no tokenizer in the directory", needed, remedy)


def _of_fault(what: str, fault: Fault) -> Check:
    return Check(what, "FAIL", fault.found, fault.rule, fault.remedy)
