"""Configurations of well-known models, so that planning needs no network.

Public facts of their `config.json`; each family's file has its own. Tests compare the parameter
counts with the published ones.
"""

from __future__ import annotations

import re
from typing import Any

from rlhf.families import FAMILIES

# What fine-tuned and converted repositories of the same model are called.
_SUFFIX = re.compile(r"(-(hf|chat|instruct|base|it|deduped|v\d+(\.\d+)*|step-\S+))+$", re.I)
_TABLE = {
    name.lower(): dict(config)
    for family in FAMILIES.values()
    for name, config in family.known.items()
}


def known_config(name: str) -> dict[str, Any] | None:
    """The configuration of a model by its hub id, in transformers' names; None: not known."""
    return _TABLE.get(name.lower()) or _TABLE.get(_SUFFIX.sub("", name).lower())


def known_names() -> list[str]:
    return list(_TABLE)
