"""What the installed transformers knows by name, without importing it (seconds, and torch).

Its tables are literals in files of the installed package, which are read, not run.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
SEQUENCE = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"


@cache
def families_with(table: str) -> frozenset[str] | None:
    """The `model_type`s in one of the tables; None: this transformers has no such table."""
    found = _tables().get(table)
    return None if found is None else frozenset(found)


@cache
def architectures() -> frozenset[str]:
    """The classes of all tables, in small letters: older files write `LLaMAForCausalLM`."""
    names = (name for table in _tables().values() for names in table.values() for name in names)
    return frozenset(name.lower() for name in names)


@cache
def functions() -> frozenset[str]:
    """The activations that a configuration may name."""
    return frozenset(_keys("activations.py", "ACT2CLS"))


@cache
def rope_types() -> frozenset[str]:
    """The kinds of rotary positions that a configuration may name."""
    found = _keys("modeling_rope_utils.py", "ROPE_INIT_FUNCTIONS")
    return frozenset({"default", *found} if found else ())


def _assigned(file: str) -> Iterator[tuple[str, ast.expr]]:
    spec = importlib.util.find_spec("transformers")
    places = list(spec.submodule_search_locations or []) if spec else []
    path = Path(places[0], file) if places else None
    if path is None or not path.is_file():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(value, ast.expr):
                yield target.id, value


def _keys(file: str, table: str) -> list[str]:
    found = dict(_assigned(file)).get(table)
    keys = found.keys if isinstance(found, ast.Dict) else []
    return [str(key.value) for key in keys if isinstance(key, ast.Constant)]


@cache
def _tables() -> dict[str, dict[str, tuple[str, ...]]]:
    """Name of a table -> family -> its classes in it."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, value in _assigned("models/auto/modeling_auto.py"):
        listed = value.args[0] if isinstance(value, ast.Call) and value.args else None
        if name.endswith("MAPPING_NAMES") and isinstance(listed, ast.List):
            # What is no pair adds another of these tables (`*list(OTHER.items())`).
            pairs = [ast.literal_eval(one) for one in listed.elts if isinstance(one, ast.Tuple)]
            found[name] = {
                family: (classes,) if isinstance(classes, str) else tuple(classes)
                for family, classes in pairs
            }
    return found
