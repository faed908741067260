"""Every setting by its dotted name: looking up, guessing the nearest, reading a value from text."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf.config.escapes import TEXT_SETTINGS, read_list, unescaped
from rlhf.config.removed import remedy
from rlhf.config.schema import RunConfig
from rlhf.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """One setting: `name` is dotted (`step1.train.batch_size`), `types` what it may hold."""

    name: str
    types: tuple[Any, ...]
    doc: str
    field: FieldInfo

    @property
    def is_list(self) -> bool:
        return list in self.types

    @property
    def is_dict(self) -> bool:
        return dict in self.types

    @property
    def is_flag(self) -> bool:
        return bool in self.types

    @property
    def default(self) -> Any:
        value = self.field.get_default(call_default_factory=True)
        return [plain(one) for one in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """A list's entry as JSON has it."""
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


@cache
def leaves() -> dict[str, Key]:
    """Dotted name -> Key, of all settings that hold a value, in the schema's order."""
    return {key.name: key for key in _walk(RunConfig, "")}


@cache
def sections() -> frozenset[str]:
    """Dotted names of all groups of settings: `step1`, `step1.train`, ..."""
    names: set[str] = set()
    for name in leaves():
        parts = name.split(".")
        names.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return frozenset(names)


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        kinds = tuple(_kinds(field.annotation))
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if section is not None:
            yield from _walk(section, f"{prefix}{name}.")
        else:
            yield Key(prefix + name, kinds, field.description or "", field)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types inside an annotation; the values of a Literal stand for themselves."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType, Literal):
        for part in get_args(annotation):
            yield from _kinds(part) if origin is not Literal else (part,)
    elif origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    else:
        yield origin or annotation


def nearest(wrong: str, names: Iterable[str], count: int = 1) -> list[str]:
    """The names most like `wrong`: by their last part first, then by the whole dotted name."""
    names = list(names)
    wrong = wrong.replace("-", "_").lower()
    leaf = wrong.rsplit(".", 1)[-1]

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, wrong, name.lower()).ratio()
        last = difflib.SequenceMatcher(None, leaf, name.rsplit(".", 1)[-1].lower()).ratio()
        return max(whole, 0.5 * whole + 0.5 * last)

    ranked = sorted(names, key=likeness, reverse=True)
    return [name for name in ranked[:count] if likeness(name) >= 0.5]


def unknown_key(wrong: str, names: Iterable[str] | None = None, where: str = "") -> ConfigError:
    """The error for a key that does not exist: what replaced it, or the nearest that does."""
    if instead := remedy(wrong):
        return ConfigError(f"{where}{wrong!r} is no longer a setting: {instead}.")
    close = nearest(wrong, leaves() if names is None else names)
    hint = f"Did you mean {close[0]!r}?" if close else "`--print-config` shows all settings."
    return ConfigError(f"{where}unknown setting {wrong!r}. {hint}")


def matching(wanted: str, names: Iterable[str]) -> list[str]:
    """Names that are `wanted` or end in it, in either spelling (`a-b`, `a_b`)."""
    wanted = wanted.replace("-", "_")
    names = list(names)
    if wanted in names:
        return [wanted]
    return [name for name in names if name.endswith("." + wanted)]


def lookup(name: str) -> Key | None:
    """The setting of that dotted name; an entry of a mapping (`data.columns.prompt`) included."""
    found = leaves().get(name)
    if found is None and "." in name:
        above = leaves().get(name.rsplit(".", 1)[0])
        found = above if above is not None and above.is_dict else None
    return found


def parse_value(text: str, key: Key) -> Any:
    """The value in a command line's text: YAML, but text as it is where a setting holds text.

    Free text has its escapes read (rlhf/config/escapes.py). Raises ConfigError.
    """
    free = key.name in TEXT_SETTINGS
    stripped = text.strip()
    if stripped in ("null", "~", ""):
        return None if type(None) in key.types else text
    collects = key.is_list or key.is_dict or tuple in key.types
    if not (collects and stripped[0] in "[{"):
        if str in key.types or text in key.types or key.is_dict:
            return unescaped(text, key.name) if free else text
        if key.is_list:
            return [unescaped(text, key.name) if free else text]
        if tuple in key.types:
            return text.split(",")
        if all(isinstance(kind, str) for kind in key.types):
            return text
    try:
        return read_list(text, key.name) if free else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{key.name}={text}: not a value that can be read ({type(error).__name__}). "
            f"{key.doc} Example: {key.name}={key.default}"
        ) from error
