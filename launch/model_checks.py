"""What a model's files tell without loading it: is it one that a step can use?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.checks import BAD_SETTING, Check, of_error
from launch.plan import Plan, StepPlan
from rlhf.config.keys import nearest
from rlhf.config.names import is_hub_model, is_path_like
from rlhf.config.schema import ModelConfig
from rlhf.errors import UserError
from rlhf.families import TINY_FAMILIES
from rlhf.plan.classes import CAUSAL, SEQUENCE, families_with
from rlhf.plan.known import known_names
from rlhf.plan.read import is_known, read_config
from rlhf.plan.roles import NEEDS_CRITIC

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
               "sentencepiece.bpe.model", "tekken.json")  # fmt: skip
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
_POINTER = b"version https://git-lfs"
_LARGE_TOKENIZER = 40 * 10**6  # bytes: reading more takes seconds


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
            return bases[name], False
        return found.path, found.id is not None

    if item.step == 1:
        one = config.step1
        yield from _use(
            (one.model.name, False), "the base of step 1", one.model, CAUSAL, one.max_length,
            "step1.max_length",
        )  # fmt: skip
    elif item.step == 2:
        two = config.step2
        own = (two.model.name, False) if two.model.name else parent("sft")
        longest = two.max_length or config.step1.max_length
        yield from _use(own, "the base of step 2", two.model, SEQUENCE, longest, "step2.max_length")
    else:
        rl, rollout = config.step3, config.step3.rollout
        longest = (rollout.max_prompt_length or config.step1.max_prompt_length) + (
            rollout.max_new_tokens
        )
        key = "step3.rollout.max_prompt_length + step3.rollout.max_new_tokens"
        yield from _use(parent("sft"), "step 3's policy", rl.actor.model, CAUSAL, longest, key)
        if rl.uses_reward_model:
            reward = "step 3's reward model"
            yield from _use(parent("reward"), reward, rl.critic.model, SEQUENCE, longest, key)
        critic = (rl.critic.model.name, False)
        if not (rl.uses_reward_model or rl.critic.model.name) and NEEDS_CRITIC[rl.algorithm]:
            critic = parent("sft")  # with a new head
        yield from _use(critic, "step 3's critic", rl.critic.model, SEQUENCE, longest, key)


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
            yield from _positions(what, read_config(name), uses)
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
    yield from _kind(what, config, uses)
    yield from _positions(what, config, uses)
    if place.is_dir():
        yield from _files(what, place, config)


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
    if not isinstance(family, str) or not family:
        found = "its config.json names no model_type"
        yield Check(what, "FAIL", found, "", "give a Hugging Face model directory")
        return
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
        found = f"its weights are quantised ({method or 'quantization_config'})"
        remedy = "give the model that it was made from: quantised weights cannot be trained"
        yield Check(what, "FAIL", found, "weights in 16 or 32 bits", remedy)
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


def _files(what: str, place: Path, config: dict[str, Any]) -> Iterator[Check]:
    """Weights and a tokenizer, both whole as far as a glance tells."""
    weights = [file for pattern in _WEIGHTS for file in sorted(place.glob(pattern))]
    if not weights:
        needed = "model.safetensors (or its shards), or pytorch_model.bin"
        yield Check(what, "FAIL", "no weights in the directory", needed, "copy all of its files")
    for file in weights[:1]:
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                found = f"{file.name} is a Git LFS pointer, not the weights"
                yield Check(what, "FAIL", found, "", f"`git lfs pull` in {place}")
    if not any((place / name).is_file() for name in _TOKENIZERS) and not list(place.glob("*.gguf")):
        needed = f"one of {', '.join(_TOKENIZERS)}"
        remedy = "copy the tokenizer's files beside the weights"
        yield Check(what, "FAIL", "no tokenizer in the directory", needed, remedy)
    yield from _vocabulary(what, place / "tokenizer.json", config)


def _vocabulary(what: str, file: Path, config: dict[str, Any]) -> Iterator[Check]:
    """Added tokens get rows of their own; the tokens of the vocabulary itself must have some."""
    rows = config.get("vocab_size")
    if not file.is_file() or file.stat().st_size > _LARGE_TOKENIZER or not isinstance(rows, int):
        return
    try:
        content = json.loads(file.read_bytes())
        tokens = len(content["model"]["vocab"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found = f"{file.name} cannot be read ({type(error).__name__})"
        yield Check(what, "FAIL", found, "a tokenizer of Hugging Face's", "copy the file again")
        return
    if tokens > rows:
        found = f"its tokenizer has {tokens:,} tokens, its embeddings have {rows:,} rows"
        yield Check(what, "FAIL", found, "", "give the tokenizer that belongs to this model")
