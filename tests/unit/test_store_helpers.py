"""Run layout, JSON files, tokenizer fingerprints."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import ArtifactError, ConfigError, RequirementError
from rlhf.store import (
    RunDir,
    canonical_json,
    fingerprint,
    jsonable,
    read_json,
    tokenizer_fingerprint,
    write_json_atomic,
)


def test_layout() -> None:
    """DESIGN: a run directory."""
    run = RunDir("output/x")
    assert [run.step_dir(n).name for n in (1, 2, 3)] == ["step1_sft", "step2_reward", "step3_ppo"]
    assert run.artifact("sft") == Path("output/x/step1_sft/artifact")
    assert run.artifact("reward") == Path("output/x/step2_reward/artifact")
    assert run.artifact("actor_ema") == Path("output/x/step3_ppo/artifact/actor_ema")
    assert run.pipeline == Path("output/x/pipeline.json")
    for call in (lambda: run.step_dir(4), lambda: run.artifact("sftt")):
        with pytest.raises(ConfigError):
            call()


def test_fingerprint_is_a_known_hash() -> None:
    """printf '{"a":[1,2.5],"b":"NaN"}' | sha256sum"""
    assert canonical_json({"b": float("nan"), "a": (1, 2.5)}) == '{"a":[1,2.5],"b":"NaN"}'
    assert fingerprint({"a": [1, 2.5], "b": "NaN"}) == EXPECTED


EXPECTED = "b972ae900c12783d60a660ddc2f9b118a5c621397a342a63c4974436b5b8045d"


@given(st.floats())
def test_floats_come_back(value: float) -> None:
    back = json.loads(json.dumps(jsonable(value), allow_nan=False))
    assert repr(float(back)) == repr(value)


def test_jsonable_refuses_what_it_does_not_know() -> None:
    assert jsonable({"p": Path("a"), "s": {2, 1}, 3: None}) == {"p": "a", "s": [1, 2], "3": None}
    with pytest.raises(TypeError, match="object"):
        jsonable({"x": object()})


def test_write_json_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "pipeline.json"
    old_mask = os.umask(0o022)
    try:
        write_json_atomic(path, {"loss": float("inf")})
    finally:
        os.umask(old_mask)
    assert read_json(path) == {"loss": "Infinity"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf.store.jsonio.os.fsync", full)
    with pytest.raises(RequirementError, match="free some space"):
        write_json_atomic(path, {"loss": 1})
    assert read_json(path) == {"loss": "Infinity"}
    assert [p.name for p in path.parent.iterdir()] == ["pipeline.json"]


def test_write_json_replaces_the_file_and_never_rewrites_it(tmp_path: Path) -> None:
    """Who has the old file open goes on reading the whole old content."""
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": 1})
    with open(path) as reader:
        write_json_atomic(path, {"a": 2})
        assert json.load(reader) == {"a": 1}
    assert read_json(path) == {"a": 2}


def test_read_json_explains(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(RequirementError, match="cannot be read"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(RequirementError, match="not valid JSON"):
        read_json(path)


def tokenizer(directory: Path, **changes: Any) -> str:
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 3, "content": "<eos>", "special": True, "normalized": False}],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    }
    content["model"].update(changes.pop("model", {}))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    return tokenizer_fingerprint(directory)


def test_tokenizer_fingerprint_sees_meaning_only(tmp_path: Path) -> None:
    """What changes an id's meaning counts; how the file is written does not."""
    base = tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    same: list[dict[str, Any]] = [
        {"padding": {"strategy": "Fixed"}, "truncation": {"max_length": 5}},
        {"model": {"merges": ["a b"]}},
        {"model": {"vocab": {"<eos>": 3, "ab": 2, "b": 1, "a": 0}}},
        {"chat_template": "x"},
    ]
    other: list[dict[str, Any]] = [
        {"model": {"vocab": {"a": 1, "b": 0, "ab": 2}}},
        {"model": {"merges": []}},
        {"added_tokens": []},
        {"added_tokens": [{"id": 3, "content": "<eos>", "special": False}]},
        {"added_tokens": [{"id": 4, "content": "<eos>", "special": True}]},
        {"added_tokens": [{"id": 3, "content": "</s>", "special": True}]},
    ]
    assert [tokenizer(tmp_path, **change) for change in same] == [base] * len(same)
    fingerprints = {base, *(tokenizer(tmp_path, **change) for change in other)}
    assert len(fingerprints) == len(other) + 1


def test_unigram_fingerprint(tmp_path: Path) -> None:
    unigram = {"vocab": [["a", -1.0], ["b", -2.0]], "merges": None}
    swapped = {"vocab": [["b", -2.0], ["a", -1.0]], "merges": None}
    assert tokenizer(tmp_path, model=unigram) != tokenizer(tmp_path, model=swapped)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 3}', '{"model": {"vocab": 3}}', "\0"])
def test_broken_tokenizer_is_explained(tmp_path: Path, text: str) -> None:
    with pytest.raises(ArtifactError, match="save_pretrained"):
        tokenizer_fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ArtifactError, match="not a tokenizer"):
        tokenizer_fingerprint(tmp_path)
