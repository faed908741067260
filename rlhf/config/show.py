"""The configuration for people (YAML with the documentation beside it) and for editors."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from rlhf.config.keys import plain
from rlhf.config.schema import RunConfig

_WIDTH = 98


def config_yaml(config: RunConfig, inherited: Mapping[str, str] | None = None) -> str:
    """All settings as YAML that `--config` reads again, each under its line of documentation."""
    lines = ["# Every setting; a recipe needs only those that differ from the defaults."]
    lines += _section(config, "", 0, inherited or {})
    return "\n".join(lines) + "\n"


def _section(model: BaseModel, prefix: str, depth: int, inherited: Mapping[str, str]) -> list[str]:
    indent = "  " * depth
    lines: list[str] = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        dotted = prefix + name
        if isinstance(value, BaseModel):
            lines += ["", f"{indent}# {field.description}", f"{indent}{name}:"]
            lines += _section(value, dotted + ".", depth + 1, inherited)
            continue
        comment = field.description or ""
        if dotted in inherited:
            comment += f" (Inherited from {inherited[dotted]}.)"
        lines += textwrap.wrap(
            comment,
            _WIDTH,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines.append(f"{indent}{name}: {scalar(value)}")
    return lines


class _OneLine(yaml.SafeDumper):
    """Text that holds a line break or a tab goes into double quotes, which say it by an escape."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OneLine.add_representer(str, _text)


def scalar(value: Any) -> str:
    """One value as YAML on one line."""
    if isinstance(value, (list, tuple)):
        value = [plain(one) for one in value]
    text = yaml.dump(
        value, Dumper=_OneLine, default_flow_style=True, width=math.inf, allow_unicode=True
    )
    return text.removesuffix("...\n").removesuffix("\n")


def json_schema() -> str:
    """JSON schema of a recipe, for editors that complete and check YAML."""
    schema = RunConfig.model_json_schema()
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Another recipe, beside this one, that is read first.",
    }
    return json.dumps(schema, indent=2, ensure_ascii=False)
