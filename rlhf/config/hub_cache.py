"""What of the hub is on this machine already, by huggingface_hub's own rules."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_directory(environ: Mapping[str, str] | None = None) -> Path:
    """Where huggingface_hub keeps downloads (its HF_HUB_CACHE and HF_HOME rules)."""
    environ = os.environ if environ is None else environ
    if chosen := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(chosen).expanduser()
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(home).expanduser() / "hub"


def is_cached(kind: str, name: str, environ: Mapping[str, str] | None = None) -> bool:
    """Has some version of a model (`models`) or data set (`datasets`) been downloaded?"""
    folder = cache_directory(environ) / f"{kind}--{name.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(any(version.iterdir()) for version in folder.iterdir())
