"""The split over steps and the held-out rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.split import Keys, assign
from tests.unit.data_help import gpt2_like, pair, run, write_jsonl

keys = st.sets(st.integers(0, 300).map(str), max_size=120).map(frozenset)
data_sets = st.lists(st.builds(Keys, keys, keys, st.booleans()), min_size=1, max_size=3)
shares = st.tuples(*[st.floats(0, 10)] * 3).filter(lambda s: sum(s) > 0.01)


@settings(max_examples=80, deadline=None)
@given(data_sets, shares, st.floats(0, 0.5), st.integers(0, 5))
def test_disjoint_complete_exact(
    sets: list[Keys], split: tuple[float, float, float], fraction: float, seed: int
) -> None:
    """C11: every content is held out or in exactly one step; the shares are exact."""
    held_out, steps = assign(sets, split, fraction, seed)
    everything = set[str]().union(*(one.train | one.held_out for one in sets))
    assert held_out.isdisjoint(steps)
    assert held_out | set(steps) == everything
    assert set[str]().union(*(one.held_out for one in sets)) <= held_out
    taken: set[str] = set()
    for one in sets:
        own = one.train - held_out - taken
        taken |= own
        for step in (1, 2, 3):
            count = sum(steps[key] == step for key in own)
            assert abs(count - len(own) * split[step - 1] / sum(split)) <= 1
    assert assign(sets, split, fraction, seed) == (held_out, steps)


@pytest.mark.parametrize("split", [(2, 4, 4), (0.2, 0.4, 0.4)])
def test_default_shares(split: tuple[float, float, float]) -> None:
    """C11: 2,4,4 of 1,000 rows are 200, 400 and 400; 5% are held out first if asked."""
    one = Keys(frozenset(map(str, range(1000))), frozenset(), False)
    _, steps = assign([one], split, 0, 7)
    assert [list(steps.values()).count(step) for step in (1, 2, 3)] == [200, 400, 400]
    held_out, steps = assign([one], split, 0.05, 7)
    assert (len(held_out), len(steps)) == (50, 950)
    assert assign([one], split, 0.05, 8)[0] != held_out


def _prompts(path: object, cache: Path, **more: object) -> dict[str, list[str]]:
    parts = {f"{step}": (step, "train") for step in (1, 2, 3)} | {"eval": (3, "eval")}
    found = {}
    for name, (step, part) in parts.items():
        data = run(path, gpt2_like(), cache, step, part=part, **more)
        found[name] = [tuple(ids) for ids in data.dataset["prompt_ids"]]
    return found  # type: ignore[return-value]


def test_order_of_rows_and_paths_changes_nothing(tmp_path: Path) -> None:
    """C11: seeded by content, not by the order of arguments, rows or by file names."""
    rows = [pair(i) for i in range(60)]
    a = write_jsonl(tmp_path / "x/a.jsonl", rows[:30])
    b = write_jsonl(tmp_path / "y/b.jsonl", rows[30:])
    first = _prompts([a, b], tmp_path / "c1")
    assert first == _prompts([b, a], tmp_path / "c2")
    a2 = write_jsonl(tmp_path / "x2/z.jsonl", rows[:30][::-1])
    assert {k: sorted(v) for k, v in first.items()} == {
        k: sorted(v) for k, v in _prompts([b, a2], tmp_path / "c3").items()
    }
    everything = [row for part in first.values() for row in part]
    assert len(everything) == len(set(everything)) == 60
    assert first != _prompts([a, b], tmp_path / "c1", seed=2)


@pytest.mark.parametrize("seed", range(3))
def test_order_of_overlapping_data_sets_changes_nothing(seed: int, tmp_path: Path) -> None:
    """C11: which data set a shared row counts for does not depend on the order of the paths."""
    a = write_jsonl(tmp_path / "a/r.jsonl", [pair(i) for i in range(40)])
    b = write_jsonl(tmp_path / "b/r.jsonl", [pair(i) for i in range(17, 70)])
    one = _prompts([a, b], tmp_path / "c1", seed=seed)
    two = _prompts([b, a], tmp_path / "c2", seed=seed)
    assert one == two


def test_duplicates_stay_in_one_step(tmp_path: Path) -> None:
    """C11, C14: copies, in one file or in two data sets, are counted and never split."""
    rows = [pair(i) for i in range(20)]
    a = write_jsonl(tmp_path / "a/r.jsonl", [*rows, *rows[:5]])
    b = write_jsonl(tmp_path / "b/r.jsonl", rows[10:])
    found = _prompts([a, b], tmp_path / "cache")
    owners = [set(part) for part in found.values()]
    assert sum(map(len, owners)) == 20
    assert sum(map(len, found.values())) == 35
    report = run([a, b], gpt2_like(), tmp_path / "cache").report
    assert report.duplicates == 15


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    """C11: a training row whose content is in the test split is dropped and counted."""
    write_jsonl(tmp_path / "d/train.jsonl", [pair(i) for i in range(20)])
    write_jsonl(tmp_path / "d/test.jsonl", [pair(i) for i in range(15, 25)])
    found = _prompts(tmp_path / "d", tmp_path / "cache")
    assert len(found["eval"]) == 10
    assert [len(found[step]) for step in "123"] == [3, 6, 6]
    held = set(found["eval"])
    assert all(held.isdisjoint(found[step]) for step in "123")
    report = run(tmp_path / "d", gpt2_like(), tmp_path / "cache").report
    assert report.dropped["training row that is also held out"] == 5


def test_limits_and_counts(tmp_path: Path) -> None:
    """C14: every row read is bad, elsewhere, dropped or kept, whatever the limits."""
    path = write_jsonl(tmp_path / "r.jsonl", [*(pair(i) for i in range(50)), "oops", {"prompt": 1}])
    for step in (1, 2, 3):
        for part in ("train", "eval"):
            more = {"max_train_rows": 3, "max_eval_rows": 2, "eval_fraction": 0.2}
            data = run(path, gpt2_like(), tmp_path / "cache", step, part=part, **more)
            report = data.report
            assert len(data.dataset) == report.kept == (3 if part == "train" else 2)
            total = report.bad_rows + report.elsewhere + report.dropped.total() + report.kept
            assert report.read == total == 52
