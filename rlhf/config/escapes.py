"""Text typed in a shell, where no key makes a line break: escapes as in YAML's double quotes.

They are read in the settings that hold free text, which models or templates see. Everywhere else
(paths, names, patterns, addresses) a backslash is a backslash. Files (recipes, resolved.json) have
their own quoting and are read as they are.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from rlhf.errors import ConfigError

TEXT_SETTINGS = frozenset(
    {"data.prompt_format", "data.response_format", "data.template", "step3.rollout.stop"}
)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.|$)", re.DOTALL)
_PLAIN = yaml.SafeLoader.ESCAPE_REPLACEMENTS


def unescaped(text: str, setting: str) -> str:
    """`text` with its escapes read. Raises ConfigError for a backslash that begins none."""

    def character(found: re.Match[str]) -> str:
        name = found[1]
        if len(name) > 1:
            code = int(name[1:], 16)
            if code <= 0x10FFFF and not 0xD800 <= code < 0xE000:
                return chr(code)
        elif name in _PLAIN:
            return _PLAIN[name]
        raise ConfigError(
            f"{setting}: {found[0]!s} is no escape; in text from the command line \\n is a line "
            "break, \\t a tab and \\u00e9 a character by its number: for a backslash itself "
            f"double it, \\\\{name}"
        )

    return _ESCAPE.sub(character, text)


class _Typed(yaml.SafeLoader):
    """YAML in which plain scalars have escapes too; what is quoted stays YAML's."""

    setting = ""


def _scalar(loader: _Typed, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    return unescaped(text, loader.setting) if node.style is None else text


_Typed.add_constructor("tag:yaml.org,2002:str", _scalar)


def read_list(text: str, setting: str) -> Any:
    """The value of `[a, "b"]` as typed. Raises yaml.YAMLError, ConfigError."""
    loader = _Typed(text)
    loader.setting = setting
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]
