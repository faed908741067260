"""Publishing an artifact: all of it appears, or nothing does."""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rlhf.config.migrate import SCHEMA_VERSION
from rlhf.errors import ArtifactError
from rlhf.store.files import (
    copy_or_link,
    disk_errors,
    exchange,
    exclusive,
    fsync_directory,
    fsync_tree,
    hash_files,
    remove,
    scan,
)
from rlhf.store.jsonio import fingerprint, jsonable, pretty_json
from rlhf.store.manifest import MANIFEST, Manifest, path_problem, read_manifest, verify

PACKAGES = (
    "rlhf-pipeline",
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "accelerate",
    "peft",
)


def publish(
    step_dir: Path | str,
    write: Callable[[Path], object],
    *,
    kind: str,
    step: int,
    parents: Mapping[str, Any],
    data_fingerprint: str,
    tokenizer_fingerprint: str,
    config: Any,
    metrics: Mapping[str, Any],
    data_sources: Any = None,
    name: str = "artifact",
) -> Manifest:
    """Calls `write(directory)` on a temporary sibling and makes it `step_dir/name`, verified.

    Until the last rename whatever was at `step_dir/name` stays as it was, however this ends.
    `parents`: name -> {"path": directory or hub id, "id": manifest id or None}; `config` and
    `metrics` may hold NaN (stored as text), paths and pydantic models.

    One process calls this (rank 0). Raises ArtifactError: disk full, directory not writable,
    another process publishing here, `write` made no file, a link, or an unusable name; and, before
    `write` is called, pydantic's ValidationError or TypeError for arguments that do not fit a
    Manifest. What else `write` raises passes through.
    """
    destination = Path(step_dir) / name
    if problem := path_problem(name):
        raise ArtifactError(f"artifact name {name!r} {problem}: use a name such as 'artifact'")
    content = jsonable(
        {
            "format": 1,
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "step": step,
            "created": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "parents": parents,
            "data_fingerprint": data_fingerprint,
            "data_sources": data_sources,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "config": config,
            "versions": library_versions(),
            "metrics": metrics,
        }
    )
    # A mistake in the arguments must show before hours of training are written and thrown away.
    Manifest.model_validate({**content, "files": {}, "id": "0" * 64})
    with disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(destination.parent):
            return _replace(destination, write, content)


def make_once(
    destination: Path, write: Callable[[Path], object], *, made_from: str, origin: Mapping[str, Any]
) -> None:
    """A "base" artifact at `destination`: kept if it verifies and was made from the same, else
    made with `write(directory)`, as `publish` does.

    `made_from`: hash of all that it is made of; `origin` says the same to a person. Others that
    make it at the same time are waited for. Raises as `publish` does.
    """
    content = jsonable(
        {
            "format": 1,
            "kind": "base",
            "step": 0,
            "created": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "parents": {},
            "data_fingerprint": made_from,
            "tokenizer_fingerprint": "",
            "config": origin,
            "versions": library_versions(),
            "metrics": {},
        }
    )
    if _is_whole(destination, made_from):
        return
    with disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(destination.parent, wait=True):
            if not _is_whole(destination, made_from):
                _replace(destination, write, content)


def amend(artifact: Path | str, texts: Mapping[str, str], metrics: Mapping[str, Any]) -> Manifest:
    """Gives a published artifact other texts (relative path -> content: its model cards) and adds
    `metrics` to its own. Its id changes, its `content_id` does not.

    A whole new directory takes the artifact's name, as in `publish`: at every moment, also after a
    kill, what is there verifies. All other files are hard links (copies, where the disk has none)
    and keep the hashes that they were published with. Raises ArtifactError: no artifact, disk full,
    another process publishing here; ValueError for a text that was not published.
    """
    artifact = Path(artifact)
    with disk_errors(artifact), exclusive(artifact.parent):
        clean(artifact)
        content = jsonable(read_manifest(artifact))
        if unknown := sorted(texts.keys() - content["files"].keys()):
            raise ValueError(f"{artifact}: {unknown[0]!r} was not published, so it has no new text")
        temporary = _sibling(artifact, "tmp")
        temporary.mkdir()
        try:
            for relative in content["files"]:
                target = temporary / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                if relative in texts:
                    target.write_text(texts[relative], encoding="utf-8")
                else:
                    copy_or_link(artifact / relative, target)
            for relative, digest in hash_files(temporary, sorted(texts)).items():
                size = (temporary / relative).stat().st_size
                content["files"][relative] = {"sha256": digest, "size": size}
            content["metrics"] |= jsonable(metrics)
            _write_record(temporary, content, MANIFEST, Manifest)
            _put(temporary, artifact)
        finally:
            remove(temporary)
    return Manifest.model_validate(content)


def _is_whole(base: Path, made_from: str) -> bool:
    try:
        return verify(base, "base").data_fingerprint == made_from
    except ArtifactError:
        return False


def _replace(
    destination: Path, write: Callable[[Path], object], content: dict[str, Any]
) -> Manifest:
    clean(destination)
    temporary = _sibling(destination, "tmp")
    temporary.mkdir()
    try:
        write(temporary)
        manifest = _finish(temporary, content)
        _put(temporary, destination)
    finally:
        remove(temporary)
    return manifest


def clean(destination: Path) -> None:
    """Removes what killed publishes left; an artifact that was set aside comes back first."""
    aside = sorted(destination.parent.glob(f".{destination.name}.old-*"))
    if aside and not os.path.lexists(destination):
        os.rename(aside.pop(), destination)
    for path in [*aside, *destination.parent.glob(f".{destination.name}.tmp-*")]:
        remove(path)


def library_versions() -> dict[str, str]:
    """Version of Python and of each library that shapes an artifact, as far as installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _sibling(destination: Path, what: str) -> Path:
    return destination.with_name(f".{destination.name}.{what}-{os.getpid()}-{secrets.token_hex(4)}")


def _finish(directory: Path, content: dict[str, Any]) -> Manifest:
    """Hashes what was written and writes the manifest, last."""
    return Manifest.model_validate(seal(directory, content, MANIFEST, Manifest))


def seal(
    directory: Path, content: dict[str, Any], name: str, kind: type[BaseModel]
) -> dict[str, Any]:
    """Writes the record `name` with the hash and size of every file, last; all of it on the disk.

    Returns the record: `content` with `files` and `id`. `kind` validates it before it is written.
    Raises ArtifactError: nothing in the directory, a link, an unusable file name.
    """
    sizes = scan(directory)
    for relative in sizes:
        if problem := path_problem(relative):
            raise ArtifactError(
                f"{directory}: {relative!a} {problem}: it cannot be published under that name"
            )
    if not sizes:
        raise ArtifactError(f"{directory}: nothing was written, so there is nothing to publish")
    digests = hash_files(directory, sorted(sizes))
    files = {path: {"sha256": digests[path], "size": sizes[path]} for path in sizes}
    return _write_record(directory, {**content, "files": files}, name, kind)


def _write_record(
    directory: Path, content: dict[str, Any], name: str, kind: type[BaseModel]
) -> dict[str, Any]:
    """Gives the record its id and writes it, when all that it vouches for is on the disk."""
    content.pop("id", None)
    content["id"] = fingerprint(content)
    kind.model_validate(content)
    fsync_tree(directory)
    with open(directory / name, "x", encoding="ascii") as stream:
        stream.write(pretty_json(content))
        stream.flush()
        os.fsync(stream.fileno())
    fsync_directory(directory)
    return content


def _put(temporary: Path, destination: Path) -> None:
    """Gives the finished directory its name; the old artifact is deleted after that."""
    if not os.path.lexists(destination):
        os.rename(temporary, destination)
    elif not exchange(temporary, destination):
        aside = _sibling(destination, "old")
        os.rename(destination, aside)
        try:
            os.rename(temporary, destination)
        except BaseException:
            os.rename(aside, destination)
            raise
        fsync_directory(destination.parent)
        remove(aside)
    fsync_directory(destination.parent)
