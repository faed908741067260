"""Which model families transformers has a class for, without importing it (seconds, and torch).

Its tables are literals in one file of the installed package, which is read, not run.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
SEQUENCE = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"


@cache
def families_with(table: str) -> frozenset[str] | None:
    """The `model_type`s in one of the tables; None: this transformers has no such table."""
    return _tables().get(table)


@cache
def _tables() -> dict[str, frozenset[str]]:
    spec = importlib.util.find_spec("transformers")
    places = list(spec.submodule_search_locations or []) if spec else []
    file = Path(places[0], "models/auto/modeling_auto.py") if places else None
    if file is None or not file.is_file():
        return {}
    found: dict[str, frozenset[str]] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if names and names[0] in (CAUSAL, SEQUENCE) and node.value.args:
            pairs = ast.literal_eval(node.value.args[0])
            found[names[0]] = frozenset(family for family, _ in pairs)
    return found
