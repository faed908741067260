"""A run's configuration from a recipe, dotted overrides and flags, later ones winning.

A recipe is YAML holding only the settings that differ from the defaults. `extends: other.yaml`
(beside it) is read first; mappings are merged, lists replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlhf.config.explain import explain
from rlhf.config.keys import lookup, parse_value, sections, unknown_key
from rlhf.config.migrate import without_removed
from rlhf.config.names import (
    LONGEST_OUTPUT,
    LONGEST_RUN,
    expand_size,
    normalize_endpoint,
    refuse_credentials,
    refuse_long,
)
from rlhf.config.schema import RunConfig
from rlhf.config.trees import flatten, merge, nest
from rlhf.errors import ConfigError

MODEL_NAMES = (
    "step1.model.name",
    "step2.model.name",
    "dpo.model.name",
    "step3.actor.model.name",
    "step3.critic.model.name",
)

# How the names of settings that are paths end.
_OF_PATHS = ("_dir", "_path", "file", "_config")


class _Loader(yaml.SafeLoader):
    """Plain values only, and a key given twice is an error rather than the last one winning."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is not text: quote it", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"the key {key!r} is given twice, first in line {seen[key]}: remove one",
                key_node.start_mark,
            )
        seen[key] = key_node.start_mark.line + 1
    loader.flatten_mapping(node)
    return loader.construct_mapping(node)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


_MALFORMED = (ValueError, TypeError, AttributeError, LookupError)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError with file and line."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file. Check --config") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from error
    # Besides its own errors PyYAML lets through what building a malformed value raises.
    except (yaml.YAMLError, RecursionError, *_MALFORMED) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            f"{path}{line}: {problem}. A recipe is YAML made of plain values: "
            "`section:` lines and indented `key: value` lines"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a recipe is a mapping `key: value`, this is {content!r:.60}")
    return content


def read_recipe(path: Path, _below: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings, origins) of a recipe with everything that it extends merged in."""
    try:
        path = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a loop of links
        raise ConfigError(f"{path}: no path to a recipe ({error}). Check `extends`") from error
    if path in _below:
        chain = " -> ".join(p.name for p in (*_below, path))
        raise ConfigError(f"{path}: `extends` runs in a circle: {chain}. Remove one of them")
    content = read_yaml(path)
    base: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if (parent := content.pop("extends", None)) is not None:
        if not isinstance(parent, str):
            raise ConfigError(
                f"{path}: extends = {parent!r}: must be one file name beside this one"
            )
        base, origins = read_recipe(path.parent / parent, (*_below, path))
    own = {key: str(path) for key in flatten(content)}
    return merge(base, content), {**origins, **own}


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """`a.b.c=value` texts -> dotted key -> value. Raises ConfigError for an unknown key."""
    flat: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ConfigError(f"{text!r}: an override is `key=value`, e.g. step3.ppo.kl_coef=0.02")
        key = lookup(name)
        if key is None:
            if name in sections():
                raise ConfigError(f"{text!r}: {name!r} is a section; name a setting inside it")
            raise unknown_key(name)
        flat[name] = parse_value(value, key)
    return flat


def load_config(
    recipe: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    origins: Mapping[str, str] | None = None,
) -> RunConfig:
    """Recipe < `overrides` < `flags` (both dotted key -> value), checked.

    `origins` says for error messages where a key was given, e.g. `--seed`. Raises ConfigError.
    """
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if recipe is not None:
        tree, sources = read_recipe(recipe)
        tree = without_removed(tree)
    for layer in (overrides or {}, flags or {}):
        tree = merge(tree, nest(layer))
        sources.update(dict.fromkeys(layer, "command line"))
    sources.update(origins or {})
    _default_deployment(tree)
    return build_config(tree, sources)


def build_config(tree: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> RunConfig:
    """Checks nested settings and puts names into their one form. Raises ConfigError."""
    try:
        config = RunConfig.model_validate(dict(tree))
    except ValidationError as error:
        raise explain(error, origins or {}) from None
    return normalize(config)


def normalize(config: RunConfig) -> RunConfig:
    """Bare sizes become names, the endpoint loses its slashes, passwords in URLs and names that no
    file system takes are refused."""
    changes: dict[str, Any] = {}
    flat = flatten(config.model_dump(exclude_unset=True))
    for name in MODEL_NAMES:
        if value := flat.get(name):
            changes[name] = refuse_credentials(refuse_long(expand_size(value), name), name)
    if "hub.endpoint" in flat:
        changes["hub.endpoint"] = normalize_endpoint(flat["hub.endpoint"])
    for path in config.data.path:
        refuse_credentials(refuse_long(path, "data.path"), "data.path")
    refuse_long(config.name, "name (--name)", name=LONGEST_RUN)
    refuse_long(config.output_dir, "output_dir (--output-dir)", path=LONGEST_OUTPUT)
    for name, value in flat.items():
        if isinstance(value, str) and name.endswith(_OF_PATHS):
            refuse_long(value, name)
    return with_values(config, changes)


def with_values(config: RunConfig, flat: Mapping[str, Any]) -> RunConfig:
    """A checked copy with some settings changed; what was left unset stays unset."""
    if not flat:
        return config
    tree = merge(config.model_dump(exclude_unset=True), nest(flat))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise explain(error, {}) from None


def _default_deployment(tree: dict[str, Any]) -> None:
    """`--num-gpus 2` alone means this machine's devices, not a contradiction."""
    launch = tree.get("launch")
    if not isinstance(launch, dict) or "deployment_type" in launch:
        return
    count = launch.get("num_gpus")
    if isinstance(count, str) and count.isdigit():
        count = int(count)
    if isinstance(count, int) and count > 1:
        tree["launch"] = {**launch, "deployment_type": "single_node"}
