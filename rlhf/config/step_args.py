"""The command line of the step scripts: `--config resolved.json` and any setting by its name."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlhf.config.escapes import TEXT_SETTINGS, unescaped
from rlhf.config.explain import explain
from rlhf.config.keys import Key, leaves, lookup, matching, nearest, parse_value, unknown_key
from rlhf.config.load import build_config, load_config, read_yaml, with_values
from rlhf.config.migrate import migrated
from rlhf.config.removed import remedy
from rlhf.config.resolve import check_batches, needs_of, refuse_redacted, resolve_step
from rlhf.config.schema import ResolvedStep
from rlhf.config.trees import at, flatten, nest
from rlhf.errors import ConfigError
from rlhf.redact import HIDDEN_SETTINGS, reveal
from rlhf.stages import STAGES, Stage, get

_SHARED = ("data.", "launch.", "hub.", "checkpoint.", "track.")


def step_config(argv: Sequence[str], step: Stage | str | int) -> ResolvedStep:
    """The configuration of a step script from its command line.

    `--config FILE` (the driver's resolved.json, or a recipe) and `--key value` or `--key=value`
    in both spellings, where key is a dotted path or a name that only one setting of the step has;
    `--sft` and `--reward` name the parents. Launchers' `--local_rank` is taken and ignored.
    Raises ConfigError.
    """
    stage = get(step)
    options, bare = split_options(argv)
    path: str | None = None
    values: dict[str, Any] = {}
    parents: dict[str, str] = {}
    for name, given in options:
        if name == "local_rank":
            continue
        if name == "config":
            path = _single(name, given)
        elif name in {one.kind for known in STAGES.values() for one in known.needs}:
            parents[name] = _single(name, given)
        else:
            key = find_key(name, stage)
            values[key.name] = _value(key, given)
    for text in bare:
        raise ConfigError(f"{text!r}: not a setting; write --key value or key=value")
    if path is None:
        raise ConfigError(
            f"--config is missing: {stage} reads its settings from the resolved.json that "
            f"`python train.py --step {stage.number}` writes into the run's directory, "
            "or from a recipe"
        )
    resolved = _load(Path(path), stage, values, parents)
    if world_size := os.environ.get("WORLD_SIZE"):
        resolved = resolved.model_copy(update={"world_size": int(world_size)})
        check_batches(resolved.config, stage, resolved.world_size)
    return resolved


def split_options(argv: Sequence[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """([(name, values)], leftovers): names without dashes and with `_`, values up to the next."""
    options: list[tuple[str, list[str]]] = []
    bare: list[str] = []
    for token in argv:
        name, equals, value = token.partition("=")
        if token.startswith("--") and len(token) > 2:
            options.append((name[2:].replace("-", "_"), [value] if equals else []))
        elif equals and lookup(name) is not None:
            options.append((name, [value]))
        elif options:
            options[-1][1].append(token)
        else:
            bare.append(token)
    return options, bare


def find_key(name: str, stage: Stage) -> Key:
    """The setting that `name` means in this stage. Raises ConfigError if none or several."""
    if (exact := lookup(name)) is not None:
        return exact
    section = f"{stage.section}."
    names = list(leaves())
    for group in (
        [n for n in names if n.startswith(section)],
        [n for n in names if n.startswith(_SHARED) or "." not in n],
    ):
        found = matching(name, group)
        if len(found) == 1:
            return leaves()[found[0]]
        if found:
            raise ConfigError(
                f"--{name} could mean several settings of {stage}: write one of "
                + ", ".join(f"--{choice}" for choice in found)
            )
    if remedy(name):
        raise unknown_key(name)
    own = [n for n in names if n.startswith((section, *_SHARED)) or "." not in n]
    close = nearest(name, own, count=3)
    hint = f"did you mean {' or '.join(f'--{n}' for n in close)}?" if close else "see the schema"
    raise ConfigError(f"--{name}: {stage} has no such setting; {hint}")


def _single(name: str, given: list[str]) -> str:
    if len(given) != 1:
        raise ConfigError(f"--{name} takes one value, {len(given)} were given: {given}")
    return given[0]


def _value(key: Key, given: list[str]) -> Any:
    if not given and key.is_flag:
        return True
    if key.is_list and len(given) > 1:
        return [unescaped(text, key.name) for text in given] if key.name in TEXT_SETTINGS else given
    name = key.name
    if len(given) != 1:
        raise ConfigError(f"--{name} takes one value, {len(given)} were given: {given}. {key.doc}")
    return parse_value(given[0], key)


def _load(
    path: Path, stage: Stage, values: dict[str, Any], parents: dict[str, str]
) -> ResolvedStep:
    content = _read(path)
    if "config" not in content:
        config = load_config(path, values)
        missing = [
            need.kind
            for need in needs_of(config, stage)
            if need.kind not in parents and not (need.spared_by and at(config, need.spared_by))
        ]
        if missing:
            flags = " and ".join(f"--{name}" for name in missing)
            raise ConfigError(
                f"{path} is a recipe: {stage} also needs {flags} "
                "(an artifact directory, HF directory or hub id)"
            )
        run_dir = Path(config.output_dir) / config.name
        return resolve_step(config, stage, run_dir=run_dir, parents=parents)
    content = reveal(content, _hidden_settings())
    if not isinstance(content["config"], dict):
        raise ConfigError(f"{path}: config = {content['config']!r:.60}: must be a mapping")
    version = content.get("schema_version", 0)
    settings = nest(migrated(flatten(content.pop("config")), version))
    config = with_values(build_config(settings, {"": str(path)}), values)
    refuse_redacted(config)
    unknown = sorted(content.keys() - ResolvedStep.model_fields.keys())
    found = content.get("stage") or content.get("step")
    if unknown or found not in (stage.name, stage.number):
        other = STAGES.get(str(found), f"step {found}")
        what = f"has unknown keys {unknown}" if unknown else f"is for {other}"
        raise ConfigError(f"{path} {what}: give {stage}'s resolved.json")
    try:
        resolved = ResolvedStep(**content).model_copy(update={"config": config})
    except ValidationError as error:
        raise explain(error, {"": str(path)}) from None
    if parents:
        resolved = resolved.model_copy(update={"parents": {**resolved.parents, **parents}})
    check_batches(config, stage, resolved.world_size)
    return resolved


def _hidden_settings() -> dict[str, Any]:
    """What the driver took out of resolved.json, since a file is no place for a secret."""
    try:
        hidden = json.loads(os.environ.get(HIDDEN_SETTINGS) or "{}")
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{HIDDEN_SETTINGS}: not JSON ({type(error).__name__}); unset it"
        ) from error
    if not isinstance(hidden, dict):
        raise ConfigError(f"{HIDDEN_SETTINGS}: must be a JSON object of settings; unset it")
    return hidden


def _read(path: Path) -> dict[str, Any]:
    if path.suffix != ".json":
        return read_yaml(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file. Check --config") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping, it is {content!r:.60}")
    return content
