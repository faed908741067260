"""Issue 5: whatever a user's file holds, a clear error or success, never a library's traceback.

Manifests are in test_store_manifest.py and test_corruption.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launch.hosts import apply_filters, parse_filter, read_hostfile
from launch.options import parse_options
from rlhf.config.keys import leaves, sections
from rlhf.config.load import load_config, nest, parse_overrides
from rlhf.config.resolve import resolve_step
from rlhf.config.step_args import step_config
from rlhf.errors import ConfigError, DataError, RequirementError, UserError
from rlhf.store import read_json
from rlhf.store.checkpoints import CHECKPOINT, read_checkpoint
from tests.unit.data_help import gpt2_like, pair, run

LOOSE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALAR = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=12)
    | st.sampled_from(
        ["auto", "0", "-1", "1e999", "nan", ".inf", "~", "null", "2001-01-01", "=", ""]
    )
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from([*leaves(), *sorted(sections())]) | st.text(max_size=10)


def accepted(call: Any, kind: type[UserError] = ConfigError) -> bool:
    """True: no error. Anything but `kind` fails the test; the message must be fit to print."""
    message = None
    try:
        call()
    except kind as error:
        message = str(error)
    if message is not None:
        assert message.strip()
        assert "Traceback" not in message
        message.encode("utf-8", "backslashreplace")
    return message is None


# --- recipes and settings


@LOOSE
@given(
    raw=st.binary(max_size=120) | st.text(max_size=120).map(lambda t: t.encode("utf-8", "replace"))
)
@example(raw=b"&a [*a]")
@example(raw=b"a: &a\n  b: *a")
@example(raw=b"<<: 1")
@example(raw=b"<<: [1]")
@example(raw=b"extends: .")
@example(raw=b"extends: r.yaml")
@example(raw=b'extends: "\\0"')
@example(raw=b"seed: 2001-13-45")
@example(raw=b"seed: !!timestamp x")
@example(raw=b"seed: !!int x")
@example(raw=b"seed: !!binary '*'")
@example(raw=b"? [a]\n: 1")
@example(raw=b"seed: 0x")
@example(raw=b"\xff\xfe")
@example(raw=b"[" * 3000)
@example(raw=b"a: {" * 1000)
@example(raw=b"seed: " + b"9" * 5000)
def test_any_bytes_as_a_recipe(tmp_path: Path, raw: bytes) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(raw)
    accepted(lambda: load_config(recipe))
    accepted(lambda: step_config(["--config", str(recipe)], 1))


@LOOSE
@given(flat=st.dictionaries(KEYS, VALUE, max_size=4))
def test_any_values_under_real_keys(tmp_path: Path, flat: dict[str, Any]) -> None:
    """Wrong types, wrong shapes, unknown names: in a recipe, and then resolved for each step."""
    recipe = tmp_path / "r.yaml"
    try:
        recipe.write_text(yaml.safe_dump(nest(flat), allow_unicode=True), encoding="utf-8")
    except (yaml.YAMLError, UnicodeEncodeError):
        return
    if accepted(lambda: load_config(recipe)):
        config = load_config(recipe)
        for step in (1, 2, 3):
            accepted(lambda step=step: resolve_step(config, step, run_dir=tmp_path))


@LOOSE
@given(
    key=st.sampled_from(list(leaves())), text=st.text(max_size=15), sign=st.sampled_from(["=", " "])
)
@example(key="data.columns", text="{a: [}", sign="=")
@example(key="data.split", text="1,2", sign="=")
@example(key="data.path", text="[", sign="=")
@example(key="seed", text="!!python/name:os", sign="=")
def test_any_text_for_a_setting(tmp_path: Path, key: str, text: str, sign: str) -> None:
    """On the driver's command line, as an override and as a flag of its own."""
    accepted(lambda: load_config(None, parse_overrides([f"{key}={text}"])), UserError)
    given_ = [f"--{key}={text}"] if sign == "=" else [f"--{key}", text]
    accepted(lambda: parse_options(given_, {}), UserError)


@LOOSE
@given(
    value=VALUE, name=st.sampled_from(["config", "step", "parents", "inherited", "run_dir", "x"])
)
def test_any_json_as_resolved_json(tmp_path: Path, value: Any, name: str) -> None:
    path = tmp_path / "resolved.json"
    content = {"step": 1, "run_dir": str(tmp_path), "parents": {}, "config": {}, name: value}
    for written in (content, value):
        path.write_text(json.dumps(written))
        accepted(lambda: step_config(["--config", str(path)], 1))


@LOOSE
@given(hidden=st.text(max_size=20) | VALUE.map(json.dumps))
def test_any_hidden_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    path = tmp_path / "resolved.json"
    path.write_text(json.dumps({"step": 1, "run_dir": "x", "parents": {}, "config": {}}))
    monkeypatch.setenv(
        "RLHF_HIDDEN_SETTINGS", hidden.replace("\0", "").encode("utf-8", "replace").decode()
    )
    accepted(lambda: step_config(["--config", str(path)], 1))


# --- hostfiles


HOSTS = st.text(st.sampled_from("ab-.:#=@, \t\nslots0123\0é"), max_size=60)


@LOOSE
@given(raw=st.binary(max_size=60) | HOSTS.map(str.encode))
@example(raw=b"a slots=" + b"9" * 5000)
@example(raw="a slots=²".encode())
@example(raw="a slots=٣".encode())
def test_any_bytes_as_a_hostfile(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(raw)
    if accepted(lambda: read_hostfile(path), UserError):
        assert all(slots > 0 for slots in read_hostfile(path).values())


@LOOSE
@given(
    text=st.text(st.sampled_from("ab:@,0129 ²٣"), min_size=1, max_size=20), exclude=st.booleans()
)
@example(text="a:²", exclude=False)
def test_any_filter(text: str, exclude: bool) -> None:
    accepted(lambda: parse_filter(text, "--include"))
    which = {"exclude" if exclude else "include": text}
    accepted(lambda: apply_filters({"a": [0, 1], "b": [0]}, **which))


# --- rows


CELL = VALUE | st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "x"]), SCALAR, max_size=3), max_size=3
)
ROW = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "response", "messages", "margin", "x"]),
    CELL,
    max_size=6,
)


def prepare_all(path: Path, cache: Path, **settings_: Any) -> None:
    for step in (1, 2, 3):
        accepted(
            lambda step=step: run(path, TOKENIZER, cache, step, **settings_),
            RequirementError,
        )


TOKENIZER = gpt2_like()


@settings(LOOSE, max_examples=40)
@given(rows=st.lists(ROW, min_size=1, max_size=4))
@example(rows=[{"messages": [], "prompt": None}])
@example(rows=[{"prompt": [{"role": "user", "content": "x"}], "chosen": [[]], "rejected": [1]}])
@example(rows=[{"messages": [{"role": "assistant", "content": "x"}]}])
@example(rows=[{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "1e999"}])
@example(rows=[{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 10**400}])
def test_any_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """Any JSON in any column, among good rows."""
    lines = [*rows, *(pair(i) for i in range(4))]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in lines), encoding="utf-8")
    prepare_all(path, tmp_path / "c", eval_fraction=0)


@settings(LOOSE, max_examples=40)
@given(
    raw=st.binary(max_size=150),
    suffix=st.sampled_from(
        ["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz", "json.xz", "csv.zst"]
    ),
)
@example(raw=b'"', suffix="csv")
@example(raw=b"a,a\n1,2\n", suffix="csv")
@example(raw=b"[1, {}]", suffix="json")
@example(raw=b'{"data": 5}', suffix="json")
@example(raw=b'{"data": {"a": []}}', suffix="json")
@example(raw=b"1" * 5000, suffix="jsonl")
@example(raw=b"ARROW1\0\0", suffix="arrow")
@example(raw=b"PAR1PAR1PAR1", suffix="parquet")
def test_any_bytes_as_a_data_file(tmp_path: Path, raw: bytes, suffix: str) -> None:
    path = tmp_path / f"r.{suffix}"
    path.write_bytes(raw)
    prepare_all(path, tmp_path / "c")


@settings(LOOSE, max_examples=40)
@given(data=st.data())
def test_a_data_file_with_damaged_bytes(tmp_path: Path, data: Any) -> None:
    """A good JSONL or CSV file in which some bytes are others."""
    raw = bytearray("\n".join(json.dumps(pair(i)) for i in range(6)).encode())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"r.{data.draw(st.sampled_from(['jsonl', 'csv', 'json']))}"
    path.write_bytes(raw)
    prepare_all(path, tmp_path / "c", eval_fraction=0)


@LOOSE
@given(
    template=st.text(max_size=15)
    | st.sampled_from(
        [
            "{{",
            "{{ x }}",
            "{% for %}",
            "{{ messages[9] }}",
            "{{ 1/0 }}",
            "{{ ''.__class__.__mro__ }}",
            "{{ raise_exception('x') }}",
            "{{ messages|tojson|foo }}",
            "{% while %}{{",
        ]
    )
)
def test_any_template(tmp_path: Path, template: str) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    accepted(lambda: run(path, TOKENIZER, tmp_path / "c", template=template), UserError)


# --- records that we wrote


@LOOSE
@given(raw=st.binary(max_size=80) | VALUE.map(lambda v: json.dumps(v).encode()))
@example(raw=b"[" * 100_000)
@example(raw=b"1" * 10_000)
def test_any_bytes_as_a_record(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "pipeline.json").write_bytes(raw)
    accepted(lambda: read_json(tmp_path / "pipeline.json"), RequirementError)
    place = tmp_path / "step-00000001"
    place.mkdir(exist_ok=True)
    (place / CHECKPOINT).write_bytes(raw)
    assert not accepted(lambda: read_checkpoint(place), RequirementError)


def test_the_reader_of_errors_would_notice() -> None:
    def library() -> None:
        raise KeyError("from inside")

    def user() -> None:
        raise DataError("x.jsonl:1: broken")

    with pytest.raises(KeyError):
        accepted(library)
    assert accepted(lambda: None)
    assert not accepted(user, RequirementError)
