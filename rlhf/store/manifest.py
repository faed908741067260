"""The manifest of an artifact, and the proof that an artifact is what it says."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rlhf.errors import ArtifactError
from rlhf.stages import STAGES, maker_of
from rlhf.store.files import hash_files, open_regular, scan
from rlhf.store.jsonio import fingerprint, pretty_json

MANIFEST = "MANIFEST.json"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
CARD = "README.md"
EVALUATION, BASE = "evaluation", "base"
_LEFTOVER = re.compile(r"\..+\.(tmp|old)-[0-9a-f-]+")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class FileRecord(_Record):
    sha256: Sha256
    size: Annotated[int, Field(ge=0)]


class ParentRecord(_Record):
    path: str
    id: Sha256 | None = None
    """The parent's manifest id; None for a model that is no artifact of ours."""


class Manifest(_Record):
    """What an artifact is, where it came from, and the hash of every file in it."""

    format: Literal[1] = 1
    kind: str
    step: Annotated[int, Field(ge=0)]
    id: Sha256
    created: str
    schema_version: Annotated[int, Field(ge=0)] = 0
    """Which release's settings `config` has: rlhf/config/migrate.py. 0: before it was written."""
    files: dict[str, FileRecord]
    parents: dict[str, ParentRecord]
    data_fingerprint: str
    data_sources: list[dict[str, Any]] | None = None
    """What the data was before it was split and tokenised: name, fingerprint of the content and
    rows of each path. None: not recorded (an older release, or a step started by hand)."""
    tokenizer_fingerprint: str
    config: dict[str, Any]
    versions: dict[str, str]
    metrics: dict[str, Any]

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        known = [*(stage.makes for stage in STAGES.values()), EVALUATION, BASE]
        if kind not in known:
            raise ValueError(f"{kind!r} is none of {', '.join(known)}")
        return kind

    @property
    def content_id(self) -> str:
        """sha256 (hex) over the files but for the model cards: stays as it is when the artifact's
        cards and metrics are amended."""
        files = {p: f.sha256 for p, f in self.files.items() if p.rpartition("/")[2] != CARD}
        return fingerprint(files)


def leftover(path: Path) -> bool:
    """Is this the temporary or the set-aside sibling of a publish?"""
    return _LEFTOVER.fullmatch(path.name) is not None


def path_problem(relative: str) -> str | None:
    """Why a file's path may not stand in a manifest; None if it may."""
    parts = relative.split("/")
    if relative.startswith("/") or "\\" in relative or "\0" in relative:
        return "is not a relative path with forward slashes"
    if any(part in ("", ".", "..") for part in parts):
        return "leads outside the artifact or is not normalised"
    if relative == MANIFEST:
        return "is the manifest's own name"
    if any("\ud800" <= character <= "\udfff" for character in relative):
        return "is not valid UTF-8"
    return None


def read_manifest(artifact: Path | str) -> Manifest:
    """The manifest, itself intact (its id and its bytes agree); the files are not looked at.

    Raises ArtifactError: absent, a leftover, not a manifest, or changed after it was written.
    """
    artifact = Path(artifact)
    path = artifact / MANIFEST
    if leftover(artifact):
        raise ArtifactError(
            f"{artifact}: this is the leftover of a publish that was killed, not an artifact: "
            "run the step again"
        )
    raw = _read(artifact)
    try:
        content = json.loads(raw)
        if pretty_json(content).encode("ascii") != raw:
            raise ValueError("its bytes are not those that were written")
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ArtifactError(
            f"{path}: not a manifest: {where!a}: {first['msg']!a}; {_again()}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged: {str(error)!a}; {_again()}") from error
    del content["id"]
    if manifest.id != fingerprint(content):
        raise ArtifactError(
            f"{path}: changed after it was written (its id is {manifest.id[:12]}, its content's "
            f"is {fingerprint(content)[:12]}); {_again(manifest.kind)}"
        )
    for relative in manifest.files:
        if problem := path_problem(relative):
            raise ArtifactError(f"{path}: the file {relative!a} {problem}; {_again(manifest.kind)}")
    return manifest


def verify(artifact: Path | str, kind: str | None = None) -> Manifest:
    """Proves that the directory holds exactly the files that were published; reads all of them.

    `kind`: also prove that it is an artifact of this kind. Raises ArtifactError (absent,
    partial, corrupt, extra file, link, wrong kind), naming the file and the remedy.
    """
    artifact = Path(artifact)
    if not artifact.is_dir():
        raise ArtifactError(_absent(artifact, kind))
    manifest = read_manifest(artifact)
    again = _again(manifest.kind)
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(
            f"{artifact}: this is a {manifest.kind!r} artifact, a {kind!r} artifact is needed: "
            f"give another directory, or {_again(kind)}"
        )
    try:
        sizes = scan(artifact)
        sizes.pop(MANIFEST)
        _compare_sizes(artifact, manifest, sizes, again)
        for relative, digest in hash_files(artifact, sorted(manifest.files)).items():
            if digest != manifest.files[relative].sha256:
                raise ArtifactError(
                    f"{artifact}: {relative!a} is corrupt (sha256 {digest[:12]}, published as "
                    f"{manifest.files[relative].sha256[:12]}); {again}"
                )
    except OSError as error:
        raise ArtifactError(
            f"{artifact}: {str(error.filename or 'a file')!a} cannot be read "
            f"({error.strerror}); give yourself read permission, or {again}"
        ) from error
    return manifest


def _compare_sizes(artifact: Path, manifest: Manifest, sizes: dict[str, int], again: str) -> None:
    for relative, record in sorted(manifest.files.items()):
        if relative not in sizes:
            raise ArtifactError(f"{artifact}: {relative!a} is missing; {again}")
        if sizes[relative] != record.size:
            raise ArtifactError(
                f"{artifact}: {relative!a} has {sizes[relative]} bytes, published were "
                f"{record.size}; {again}"
            )
    if extra := sorted(sizes.keys() - manifest.files.keys()):
        raise ArtifactError(
            f"{artifact}: unexpected file {extra[0]!a} ({len(extra)} in all), not there when it "
            f"was published: move it out of the artifact, or {again}"
        )


def _read(artifact: Path) -> bytes:
    path = artifact / MANIFEST
    try:
        with open(open_regular(path), "rb") as stream:
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ArtifactError(f"{path}: not a regular file; {_again()}")
            return stream.read()
    except FileNotFoundError as error:
        whole = next((p for p in artifact.absolute().parents if (p / MANIFEST).is_file()), None)
        if whole is not None:
            raise ArtifactError(
                f"{artifact}: this is a part of the artifact {whole}: verify that one"
            ) from error
        raise ArtifactError(
            f"{artifact}: no {MANIFEST}, so it was never finished or is not ours; {_again()}"
        ) from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); {_again()}") from error


def _absent(artifact: Path, kind: str | None) -> str:
    if artifact.parent.is_dir():
        for sibling in sorted(artifact.parent.glob(f".{artifact.name}.old-*")):
            return (
                f"{artifact}: a publish was killed while it replaced this artifact; the previous "
                f"one is {sibling}: rename it to {artifact.name!r}, or {_again(kind)}"
            )
    what = f"no {kind!r} artifact" if kind else "no artifact"
    return f"{artifact}: {what} here; {_again(kind)}"


def _again(kind: str | None = None) -> str:
    if kind == EVALUATION:
        return "make it with: python train.py evaluate RUN"
    if kind in (None, BASE):
        return "run the step again"
    return f"make it with: python train.py --step {maker_of(kind).number}"
