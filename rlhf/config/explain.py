"""Turns pydantic's findings into one plain message: the value, the rule, the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from rlhf.config.keys import Key, lookup, sections, unknown_key
from rlhf.errors import ConfigError

_RULES = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_pattern_mismatch": "must match {pattern}",
    "list_type": "must be a list",
    "tuple_type": "must be a list of {count} values",
    "dict_type": "must be a mapping, `name: value`",
    "model_type": "must be a section with settings of its own",
    "too_short": "needs at least {min_length} value(s)",
    "too_long": "takes at most {max_length} value(s)",
    "literal_error": "must be one of {expected}",
}


def explain(error: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    """One ConfigError for all that is wrong. `origins`: dotted key -> where its value was given."""
    lines: list[str] = []
    for finding in _one_per_place(error):
        line = _explain_one(finding, origins)
        if line not in lines:
            lines.append(line)
    return ConfigError("\n".join(lines))


def _one_per_place(error: ValidationError) -> list[dict[str, Any]]:
    """Merges the findings on one setting: a value that may be several types has one for each."""
    places: dict[str, dict[str, Any]] = {}
    for details in error.errors(include_url=False):
        finding: dict[str, Any] = {**details}
        name = dotted(finding["loc"])
        rule = _rule(finding, name)
        if name not in places:
            places[name] = {**finding, "name": name, "rules": []}
        if rule not in places[name]["rules"]:
            places[name]["rules"].append(rule)
    return list(places.values())


def dotted(location: tuple[Any, ...]) -> str:
    """pydantic's location as the longest dotted name that we have (without union members)."""
    name = ""
    for part in location:
        longer = f"{name}.{part}" if name else str(part)
        known = longer in sections() or lookup(longer) is not None
        if name and lookup(name) is not None and not known:
            break
        name = longer
    return name


def _rule(finding: dict[str, Any], name: str) -> str:
    kind, context = finding["type"], finding.get("ctx", {})
    if kind == "value_error":
        return str(context.get("error", finding["msg"]))
    if kind == "missing":
        key = lookup(name)
        return "has too few values" if key is not None else "is missing"
    template = _RULES.get(kind)
    if template is None:
        return str(finding["msg"])
    if kind == "tuple_type":
        key = lookup(name)
        context = {"count": len(key.default) if key is not None else "several"}
    return template.format(**context)


def _explain_one(finding: dict[str, Any], origins: Mapping[str, str]) -> str:
    name, value = finding["name"], finding["input"]
    where = _origin(name, origins)
    if finding["type"] == "extra_forbidden":
        return str(unknown_key(name, where=where))
    rules = ", or ".join(finding["rules"])
    key = lookup(name)
    if key is None:  # a relation between several settings: its message says values and remedy
        if finding["type"] != "value_error":
            rules = f"it {rules}, it is {_show(value)}"
        return f"{where}{name + ': ' if name else ''}{rules}"
    if finding["type"] == "value_error":
        return f"{where}{name}: {rules}"
    return f"{where}{name} = {_show(value)}: it {rules}. {_remedy(key)}"


def _remedy(key: Key) -> str:
    default = key.default
    shown = "unset" if default is None else _show(default)
    return f"{key.doc.strip()} Default: {shown}."


def _origin(name: str, origins: Mapping[str, str]) -> str:
    """`name`'s own origin, or that of a key inside it, as a prefix of the message."""
    if name in origins:
        return f"{origins[name]}: "
    return next((f"{o}: " for key, o in origins.items() if key.startswith(name + ".")), "")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
