"""Manifests from anywhere: a clear ArtifactError or success, never a library's traceback."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.errors import ArtifactError
from rlhf.store import MANIFEST, fingerprint, pretty_json, publish, verify

ROOT = Path(__file__).parents[2]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
LOOSE = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    publish(
        tmp_path,
        lambda directory: (directory / "a.bin").write_text("a"),
        kind="sft",
        step=1,
        parents={"base": {"path": "x", "id": None}},
        data_fingerprint="d",
        tokenizer_fingerprint="t",
        config={"a": {"b": [1, 2.5, None]}},
        metrics={"loss": 1.0},
    )
    return tmp_path / "artifact"


def outcome(artifact: Path, raw: bytes) -> str | None:
    """None: accepted; else the message. Anything but ArtifactError fails the test."""
    (artifact / MANIFEST).write_bytes(raw)
    message = None
    try:
        verify(artifact)
    except ArtifactError as error:
        message = str(error)
    if message is not None:
        assert str(artifact) in message
        message.encode("utf-8")  # printable wherever it goes
    return message


def seal(content: dict) -> bytes:
    """What an attacker or a later version would write: consistent with itself."""
    content = {key: value for key, value in content.items() if key != "id"}
    return pretty_json({**content, "id": fingerprint(content)}).encode("ascii")


@LOOSE
@given(raw=st.binary(max_size=200))
def test_any_bytes(artifact: Path, raw: bytes) -> None:
    assert outcome(artifact, raw) is not None


@LOOSE
@given(value=JSON)
def test_any_json(artifact: Path, value) -> None:
    assert outcome(artifact, pretty_json(value).encode("ascii")) is not None
    assert outcome(artifact, json.dumps(value).encode("ascii")) is not None


@LOOSE
@given(data=st.data(), value=JSON)
def test_any_json_in_any_place_of_a_sealed_manifest(artifact: Path, data, value) -> None:
    """Everything but the replaced value is right, the id included."""
    path = artifact / MANIFEST
    original = path.read_bytes()
    content = json.loads(original)
    changed = copy.deepcopy(content)
    place = changed
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = value
        break
    message = outcome(artifact, seal(changed))
    if message is None:
        assert changed["files"] == content["files"]
    path.write_bytes(original)
    verify(artifact)


@pytest.mark.parametrize(
    "relative",
    ["/etc/passwd", "../a.bin", "x/../a.bin", "./a.bin", "x//a", "", "a\\b", "a\0b", "\ud800"],
)
def test_paths_out_of_the_directory(artifact: Path, relative: str) -> None:
    """A sealed manifest that lists a path outside is refused for that reason."""
    content = json.loads((artifact / MANIFEST).read_bytes())
    content["files"][relative] = content["files"]["a.bin"]
    message = outcome(artifact, seal(content))
    assert message is not None
    assert "missing" not in message
    assert repr(relative)[1:-1].replace("\\", "") in message.replace("\\", "")


def test_manifest_lists_itself(artifact: Path) -> None:
    content = json.loads((artifact / MANIFEST).read_bytes())
    content["files"][MANIFEST] = content["files"]["a.bin"]
    assert "manifest's own name" in (outcome(artifact, seal(content)) or "")


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 5_000 + b"]" * 5_000,
        b"1" * 10_000,
        b"1e999",
        b"NaN",
        b'"\\ud800"',
        b"\xff\xfe{}",
    ],
)
def test_hostile_json(artifact: Path, raw: bytes) -> None:
    assert outcome(artifact, raw) is not None


def test_a_later_format_says_so(artifact: Path) -> None:
    content = json.loads((artifact / MANIFEST).read_bytes())
    assert "format" in (outcome(artifact, seal({**content, "format": 2})) or "")
    assert "surprise" in (outcome(artifact, seal({**content, "surprise": 1})) or "")


def test_no_torch() -> None:
    """DESIGN: rlhf.store never imports torch, nor more than config, stages, errors and theirs."""
    code = (
        "import sys, rlhf.store; print(sorted(m for m in sys.modules if m.split('.')[0] in "
        "('torch', 'transformers', 'accelerate', 'deepspeed', 'numpy') or "
        "m.startswith('rlhf.') and m.split('.')[1] not in ('store', 'config', 'stages', 'errors', "
        "'redact', 'secrets')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
