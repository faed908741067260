"""A row's own columns, from the file to the reward function: one value for each answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema import DataConfig
from rlhf.data import collate_prompts
from rlhf.data.encode import SCHEMAS
from rlhf.data.prepare import prepare
from rlhf.data.shapes import Reader, detect
from rlhf.data.sources.base import BadRow
from rlhf.errors import ConfigError, DataError
from tests.unit.data_help import gpt2_like

ROWS = [
    {
        "question": f"({i}) + 1?",
        "answer": f" It is {i + 1}.",
        "gold": i + 1,
        "notes": [str(i)],
    }
    for i in range(40)
]


def write(place: Path, rows: list[dict[str, Any]]) -> str:
    path = place / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(place: Path, rows: list[dict[str, Any]], step: Any = 3, **settings: Any) -> Any:
    data = DataConfig(path=[write(place, rows)], cache_dir=str(place / "cache"), **settings)
    return prepare(
        data, step, gpt2_like(), seed=1, max_prompt_length=40, max_length=None if step == 3 else 80
    )


def test_columns_reach_the_batch(tmp_path: Path) -> None:
    """`answer` is both: what step 1 learns, and what a reward is given."""
    found = prepared(tmp_path, ROWS, keep_columns=["gold", "notes", "answer"], split=(0, 0, 1))
    batch = collate_prompts(found.dataset.to_list(), 0)
    assert len(batch.prompts) > 30
    for number, prompt in enumerate(batch.prompts):
        (row,) = [row for row in ROWS if row["question"] in prompt]
        kept = {name: column[number] for name, column in batch.columns.items()}
        assert kept == {name: row[name] for name in ("gold", "notes", "answer")}
    assert any("; kept for rewards: gold, notes, answer" in line for line in found.report.lines())
    moved = batch.to("cpu")
    assert moved.columns == batch.columns


def test_without_them_rows_and_cache_are_as_before(tmp_path: Path) -> None:
    """No column more; and steps 1 and 2 have the same file in the cache with them."""
    plain = prepared(tmp_path, ROWS)
    assert plain.dataset.column_names == SCHEMAS["prompts"].names
    assert collate_prompts(plain.dataset.to_list(), 0).columns == {}
    first = prepared(tmp_path, ROWS, 1, ignore_columns=["gold"])
    before = sorted((tmp_path / "cache").glob("*.arrow"))
    kept = prepared(tmp_path, ROWS, 1, ignore_columns=["gold"], keep_columns=["gold"])
    assert kept.fingerprint == first.fingerprint
    assert sorted((tmp_path / "cache").glob("*.arrow")) == before


def test_special_tokens_in_a_column_are_what_they_are(tmp_path: Path) -> None:
    """Text of the data is marked while it is read, so that no special token comes of it."""
    rows = [row | {"gold": "<|endoftext|>"} for row in ROWS]
    found = prepared(tmp_path, rows, keep_columns=["gold"])
    assert set(collate_prompts(found.dataset.to_list(), 0).columns["gold"]) == {"<|endoftext|>"}


def test_a_column_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep_columns=\[gol\]: .* no column 'gol'.*'gold'"):
        prepared(tmp_path, ROWS, keep_columns=["gol"])


def test_a_row_without_its_value_is_counted_and_located(tmp_path: Path) -> None:
    """In step 3 alone; a reward function is never given a hole."""
    rows = [row | ({"gold": None} if i % 4 == 0 else {}) for i, row in enumerate(ROWS)]
    settings: dict[str, Any] = {"keep_columns": ["gold"], "split": (0, 0, 1), "eval_fraction": 0.0}
    report = prepared(tmp_path, rows, **settings).report
    (reason,) = report.bad
    assert reason == "column 'gold' of data.keep_columns is missing or null"
    assert (report.bad[reason][0], report.kept) == (10, 30)
    assert all(int(where.rpartition(":")[2]) % 4 == 1 for where in report.bad[reason][1])
    one = {"keep_columns": ["gold"], "split": (1, 0, 0), "eval_fraction": 0.0}
    assert prepared(tmp_path, rows, 1, **one).report.kept == 40
    with pytest.raises(DataError, match=r"of data\.keep_columns is missing or null"):
        prepared(tmp_path, rows, max_bad_rows=9, **settings)


def test_what_json_cannot_hold_is_refused() -> None:
    data = DataConfig(keep_columns=["picture"])
    reader = Reader(detect(["prompt", "picture"], [], data), data)
    with pytest.raises(BadRow, match=r"'picture' is to be kept .* and holds a bytes"):
        reader.kept({"prompt": "a", "picture": b"\0"})


def test_a_kept_column_may_change_what_a_row_means() -> None:
    """It is named, so it is not used unknowingly: `label` here is what is right."""
    columns = ["prompt", "label"]
    row = {"prompt": "2 + 2", "label": "4"}
    with pytest.raises(DataError, match="column 'label' may change what a row means"):
        detect(columns, [row], DataConfig())
    shape = detect(columns, [row], DataConfig(keep_columns=["label"]))
    assert shape.kind.name == "prompts"
    assert Reader(shape, DataConfig(keep_columns=["label"])).kept(row) == {"label": "4"}
