"""Publishing and verifying artifacts: every kind of damage is found and named."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ArtifactError
from rlhf.store import MANIFEST, RunDir, fingerprint, publish, read_json, read_manifest, verify
from rlhf.store import files as store_files

FIELDS: dict[str, Any] = {
    "kind": "ppo",
    "step": 3,
    "parents": {"sft": {"path": "../step1_sft/artifact", "id": "0" * 64}},
    "data_fingerprint": "d",
    "tokenizer_fingerprint": "t",
    "config": {"seed": 1, "rate": 1e-5},
    "metrics": {"loss": 0.25, "kl": float("nan")},
}
FILES = {
    "config.json": b'{"a": 1}',
    "actor/model.safetensors": bytes(range(256)) * 5000,
    "critic/model.safetensors": bytes(range(255, -1, -1)) * 5000,
    "empty.txt": b"",
}


def write(directory: Path) -> None:
    for relative, data in FILES.items():
        path = directory / relative
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    publish(tmp_path, write, **FIELDS)
    return tmp_path / "artifact"


def refused(artifact: Path, *words: str, kind: str | None = None) -> None:
    with pytest.raises(ArtifactError) as caught:
        verify(artifact, kind)
    message = str(caught.value)
    for word in [*words, str(artifact)]:
        assert word in message, message


def test_published_verifies_and_records_everything(artifact: Path) -> None:
    """DESIGN: the manifest holds every file's hash and size, parents, fingerprints, config."""
    manifest = verify(artifact, "ppo")
    assert manifest == read_manifest(artifact)
    assert {path: record.size for path, record in manifest.files.items()} == {
        path: len(data) for path, data in FILES.items()
    }
    # sha256 of nothing, a published constant
    assert manifest.files["empty.txt"].sha256.startswith("e3b0c44298fc1c149afbf4c8996fb924")
    assert manifest.parents["sft"].id == "0" * 64
    assert manifest.config == {"seed": 1, "rate": 1e-5}
    assert manifest.metrics == {"loss": 0.25, "kl": "NaN"}
    assert "python" in manifest.versions
    content = read_json(artifact / MANIFEST)
    assert content.pop("id") == fingerprint(content)
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]


@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file(artifact: Path, name: str) -> None:
    """DESIGN: an artifact is done when its manifest verifies; damage names the file."""
    path, data = artifact / name, FILES[name]
    if data:
        for position in {0, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            refused(artifact, name, "corrupt", "python train.py --step 3")
        path.write_bytes(data[:-1])
        refused(artifact, name, f"{len(data) - 1} bytes")
    path.write_bytes(data + b"x")
    refused(artifact, name, f"{len(data) + 1} bytes")
    path.unlink()
    refused(artifact, name, "missing")
    path.mkdir()
    refused(artifact, name, "missing")


def test_swapped_and_extra_files(artifact: Path) -> None:
    first, second = artifact / "actor/model.safetensors", artifact / "critic/model.safetensors"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    refused(artifact, "actor/model.safetensors", "corrupt")
    first.write_bytes(a)
    second.write_bytes(b)
    verify(artifact)
    (artifact / "actor" / "extra.bin").write_bytes(b"")
    refused(artifact, "actor/extra.bin", "unexpected")


def test_any_flipped_byte_of_the_manifest(artifact: Path) -> None:
    """Also a flip within white space, which JSON itself would not notice."""
    path = artifact / MANIFEST
    raw = path.read_bytes()
    for position in range(0, len(raw), 3):
        for flip in (0x01, 0x29):  # 0x29 makes a tab of a space
            changed = bytearray(raw)
            changed[position] ^= flip
            path.write_bytes(changed)
            with pytest.raises(ArtifactError):
                read_manifest(artifact)
    path.write_bytes(raw[:-1])
    refused(artifact, "damaged")
    path.write_bytes(raw)
    verify(artifact)


def test_manifest_of_another_artifact(artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    publish(other, lambda d: (d / "x").write_text("x"), **FIELDS)
    shutil.copy(other / "artifact" / MANIFEST, artifact / MANIFEST)
    refused(artifact, "'x'", "missing")


def test_links_and_special_files_are_refused(artifact: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    path = artifact / "actor/model.safetensors"
    shutil.move(path, outside)
    path.symlink_to(outside)  # same bytes, but not in the directory
    refused(artifact, "actor/model.safetensors", "symbolic link")
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever
    refused(artifact, "actor/model.safetensors", "not a file")
    path.unlink()
    shutil.rmtree(artifact / "actor")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(outside, tmp_path / "elsewhere/model.safetensors")
    (artifact / "actor").symlink_to(tmp_path / "elsewhere")
    refused(artifact, "'actor'", "symbolic link")
    shutil.move(artifact / MANIFEST, tmp_path / MANIFEST)
    (artifact / MANIFEST).symlink_to(tmp_path / MANIFEST)
    refused(artifact, MANIFEST, "cannot be read")


def test_publish_refuses_links_nothing_and_a_foreign_manifest(tmp_path: Path) -> None:
    def link(directory: Path) -> None:
        (directory / "passwd").symlink_to("/etc/passwd")

    cases: list[tuple[Callable[[Path], object], str]] = [
        (link, "symbolic link"),
        (lambda d: None, "nothing"),
        (lambda d: (d / MANIFEST).write_text("{}"), "manifest's own name"),
        (lambda d: (d / "a\\b").write_text(""), "forward slashes"),
    ]
    for bad, word in cases:
        with pytest.raises(ArtifactError, match=word):
            publish(tmp_path, bad, **FIELDS)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../artifact", "/tmp/artifact", "", ".", "a//b", "a/../../b"])
def test_publish_stays_inside_the_step(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="artifact name"):
        publish(tmp_path / "step", write, name=name, **FIELDS)
    assert list(tmp_path.iterdir()) == []


def test_wrong_kind_absent_and_part(artifact: Path, tmp_path: Path) -> None:
    """C3: the message names the command that makes what is missing."""
    refused(artifact, "'ppo'", "'reward'", "python train.py --step 2", kind="reward")
    refused(tmp_path / "no", "python train.py --step 1", kind="sft")
    refused(artifact / "actor", "part of the artifact")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no MANIFEST.json")
    refused(artifact / "config.json", "no artifact")


def test_named_parts_can_be_published_alone(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for part in ("actor", "critic"):
        publish(run.step_dir(3), write, name=f"artifact/{part}", **FIELDS)
        assert verify(run.artifact(part)).kind == "ppo"


def test_made_again_in_the_same_second_is_another_artifact(tmp_path: Path) -> None:
    """What was made from the first must not pass for made from the second."""
    assert publish(tmp_path, write, **FIELDS).id != publish(tmp_path, write, **FIELDS).id


def test_republish_replaces_without_a_trace(artifact: Path) -> None:
    publish(artifact.parent, lambda d: (d / "new").write_text("new"), **FIELDS)
    assert set(verify(artifact).files) == {"new"}
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]


def test_republish_where_the_system_cannot_exchange(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.store.publishing.exchange", lambda *_: False)
    test_republish_replaces_without_a_trace(artifact)


def test_a_linked_artifact_is_replaced_not_followed(artifact: Path, tmp_path: Path) -> None:
    step = tmp_path / "step"
    step.mkdir()
    (step / "artifact").symlink_to(artifact)
    publish(step, lambda d: (d / "new").write_text("new"), **FIELDS)
    assert set(verify(step / "artifact").files) == {"new"}
    assert set(verify(artifact).files) == set(FILES)


def test_bad_arguments_fail_before_anything_is_written(tmp_path: Path) -> None:
    called: list[Path] = []
    for change in ({"kind": "sftt"}, {"parents": {"sft": "path"}}, {"metrics": {"x": object()}}):
        with pytest.raises((ValueError, TypeError)):
            publish(tmp_path, called.append, **{**FIELDS, **change})
    assert called == []


def test_a_failing_write_leaves_the_previous_artifact(artifact: Path) -> None:
    def fail(directory: Path) -> None:
        write(directory)
        raise KeyError("a bug, not the disk")

    before = verify(artifact)
    with pytest.raises(KeyError):
        publish(artifact.parent, fail, **FIELDS)
    assert verify(artifact) == before
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]


def dev_full(directory: Path) -> None:
    write(directory)
    with open("/dev/full", "wb", buffering=0) as stream:
        stream.write(b"x")


def rust_full(directory: Path) -> None:
    raise RuntimeError("Error: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("full", [dev_full, rust_full])
def test_a_full_disk_is_explained(artifact: Path, full) -> None:
    before = verify(artifact)
    with pytest.raises(ArtifactError, match="free some space") as caught:
        publish(artifact.parent, full, **FIELDS)
    assert str(artifact) in str(caught.value)
    assert verify(artifact) == before
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]


def test_a_failing_last_rename_puts_the_old_one_back(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if ".tmp-" in str(source):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
        rename(source, target)

    before = verify(artifact)
    monkeypatch.setattr("rlhf.store.publishing.exchange", lambda *_: False)
    monkeypatch.setattr("rlhf.store.publishing.os.rename", failing)
    with pytest.raises(ArtifactError, match="choose a writable"):
        publish(artifact.parent, write, **FIELDS)
    assert verify(artifact) == before
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]


def test_a_file_in_the_way_is_explained(tmp_path: Path) -> None:
    (tmp_path / "step").write_text("")
    with pytest.raises(ArtifactError, match="a file is in the way"):
        publish(tmp_path / "step", write, **FIELDS)


def test_two_publishers_do_not_meet(tmp_path: Path) -> None:
    def nested(directory: Path) -> None:
        publish(tmp_path, write, **FIELDS)

    with pytest.raises(ArtifactError, match="another process"):
        publish(tmp_path, nested, **FIELDS)


def test_leftovers_are_never_accepted_and_cleaned(artifact: Path) -> None:
    """A killed publish's siblings, even complete ones, are no artifacts."""
    for what in ("tmp", "old"):
        leftover = artifact.with_name(f".artifact.{what}-123-00ff")
        shutil.copytree(artifact, leftover)
        refused(leftover, "leftover")
    publish(artifact.parent, write, **FIELDS)
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]


def test_an_artifact_set_aside_comes_back(artifact: Path) -> None:
    aside = artifact.with_name(".artifact.old-123-00ff")
    artifact.rename(aside)
    refused(artifact, aside.name, "rename it")

    def fail(directory: Path) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        publish(artifact.parent, fail, **FIELDS)
    verify(artifact)


def test_hash_loop_of_python_3_10(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_files.sys, "version_info", (3, 10))
    monkeypatch.setattr(store_files, "CHUNK", 7)
    verify(artifact)
