"""The split over steps and the held-out rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf.data.sources.base import sha256
from rlhf.data.split import MIN_UNSEEN, Keys, assign, prompt_key
from rlhf.errors import DataError
from rlhf.text import normalised
from tests.unit.data_help import CASES, SHARED, gpt2_like, needs_shared, pair, run, write_jsonl

# Content "7" has prompt "p7 modulo the number of prompts": what a row is decides what it asks.
contents = st.sets(st.integers(0, 300), max_size=120)
shares = st.tuples(*[st.floats(0, 10)] * 3).filter(lambda s: sum(s) > 0.01)


def keys(train: Iterable[int], held_out: Iterable[int], prompts: int) -> Keys:
    one, other = ({str(i): f"p{i % prompts}" for i in part} for part in (train, held_out))
    return Keys(one, other, bool(other))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(contents, contents | st.just(set())), min_size=1, max_size=3),
    st.sampled_from([1, 2, 20, 50, 90, 301]),
    shares,
    st.floats(0, 0.5),
    st.integers(0, 5),
)
@example([(set(range(50)), set(range(400, 460)))], 90, (2, 4, 4), 0.05, 1)
@example([(set(range(50)), set(range(400, 460))), (set(range(80)), set())], 90, (1, 1, 1), 0.2, 2)
def test_disjoint_complete_exact(
    parts: list[tuple[set[int], set[int]]],
    prompts: int,
    split: tuple[float, float, float],
    fraction: float,
    seed: int,
) -> None:
    """C11, 38: every content has one place; the shares are exact; no drawn prompt is trained on,
    and no prompt of a test split but those that its data set cannot do without."""
    sets = [keys(train, held, prompts) for train, held in parts]
    got = assign(sets, split, fraction, seed)
    places = [set(got.held_out), set(got.left_out), set(got.shares)]
    everything = set[str]().union(*(one.train.keys() | one.held_out.keys() for one in sets))
    assert sum(map(len, places)) == len(everything)
    assert set().union(*places) == everything
    brought = set[str]().union(*(one.held_out for one in sets))
    assert brought <= got.held_out | got.left_out
    assert got.left_out <= brought
    taken: set[str] = set()
    for one in sets:
        own = one.train.keys() - got.held_out - got.left_out - taken
        taken |= own
        for step in (1, 2, 3):
            count = sum(got.shares[key] == step for key in own)
            assert abs(count - len(own) * split[step - 1] / sum(split)) <= 1

    def asked(rows: Iterable[str]) -> set[str]:
        return {f"p{int(key) % prompts}" for key in rows}

    assert got.trained == asked(got.shares)
    assert asked(got.held_out - brought).isdisjoint(got.trained), "drawn prompts"
    for one in sets:
        seen = {key for key in one.held_out if asked([key]) <= got.trained}
        enough = len(asked(one.held_out.keys() - seen)) >= MIN_UNSEEN
        others = set[str]().union(*(two.held_out for two in sets if two is not one))
        if enough:
            assert seen - others <= got.left_out
        else:
            assert one.held_out.keys() <= got.held_out
        own_train = asked(one.train.keys() - brought)
        assert asked(one.held_out) - own_train <= (asked(everything) - got.trained), "kept back"
    assert assign(sets[:], split, fraction, seed) == got


@pytest.mark.parametrize("split", [(2, 4, 4), (0.2, 0.4, 0.4)])
def test_default_shares(split: tuple[float, float, float]) -> None:
    """C11: 2,4,4 of 1,000 rows are 200, 400 and 400; 5% are held out first if asked."""
    one = keys(range(1000), [], 1000)
    steps = assign([one], split, 0, 7).shares
    assert [list(steps.values()).count(step) for step in (1, 2, 3)] == [200, 400, 400]
    got = assign([one], split, 0.05, 7)
    assert (len(got.held_out), len(got.shares)) == (50, 950)
    assert assign([one], split, 0.05, 8).held_out != got.held_out


def test_one_row_a_prompt_is_split_by_rows() -> None:
    """Without prompts in common the split is the one by rows: the 5% that come first in the order
    of their seeded hashes."""
    rows = [str(i) for i in range(1000)]
    first = sorted(rows, key=lambda key: sha256(f"3:held-out:{key}"))[:50]
    assert assign([keys(range(1000), [], 1000)], (2, 4, 4), 0.05, 3).held_out == set(first)


def test_prompts_have_equal_chances() -> None:
    """A prompt with many rows is drawn as often as one with a single row: it has one ticket."""
    rows = Keys({"big" + str(i): "big" for i in range(900)} | {str(i): f"p{i}" for i in range(9)},
                {}, False)  # fmt: skip
    drawn = ["big0" in assign([rows], (1, 1, 1), 0.1, seed).held_out for seed in range(400)]
    assert 20 <= sum(drawn) <= 62  # 40 expected, standard deviation 6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is  it?", " what is IT?\n"),
        ("\ufb01ne \u2460", "fine 1"),
        ("Hello", [{"role": "user", "content": "hello "}]),
        ([{"role": "user", "content": "A"}, {"role": "assistant", "content": "B\n"}],
         [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ],
)  # fmt: skip
def test_the_same_prompt(one: Any, other: Any) -> None:
    assert prompt_key(one) == prompt_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is it?", "What was it?"),
        ([{"role": "user", "content": "A"}], [{"role": "system", "content": "A"}]),
        ([{"role": "system", "content": "S"}, {"role": "user", "content": "A"}],
         [{"role": "system", "content": "T"}, {"role": "user", "content": "A"}]),
    ],
)  # fmt: skip
def test_other_prompts(one: Any, other: Any) -> None:
    assert prompt_key(one) != prompt_key(other)


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


def _held_and_trained(path: object, cache: Path, **more: Any) -> tuple[set[str], set[str]]:
    """Normalised texts of the held-out prompts and of those of all steps' training rows."""

    def texts(step: int, part: str) -> set[str]:
        tokenizer = gpt2_like()
        found = run(path, tokenizer, cache, step, part=part, max_prompt_length=4000,
                    max_length=5000, **more).dataset  # fmt: skip
        return {normalised(tokenizer.decode(ids)) for ids in found["prompt_ids"]}

    return texts(2, "eval"), texts(1, "train") | texts(2, "train") | texts(3, "train")


@pytest.mark.parametrize("seed", range(3))
def test_held_out_prompts_are_trained_on_nowhere(seed: int, tmp_path: Path) -> None:
    """38: several pairs of a prompt go together, however its letters and spaces are written."""
    rows = [
        pair(i, prompt=f"\n\nHuman: {'Why' if k % 2 else 'why '} {i}?\n\nAssistant:",
             chosen=f" because {i} {k}", response=None)
        for i in range(40)
        for k in range(8)
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    held, trained = _held_and_trained(path, tmp_path / "c", seed=seed)
    assert (len(held), len(trained)) == (2, 38)
    assert held.isdisjoint(trained)
    data = run(path, gpt2_like(), tmp_path / "c", part="eval", seed=seed)
    assert vars(data.held_out) == {"rows": 16, "prompts": 2, "seen": 0}
    train = run(path, gpt2_like(), tmp_path / "c", seed=seed).held_out
    assert train.prompts == train.seen


@pytest.mark.parametrize("form", ["implicit", "conversation", "implicit conversation"])
def test_every_form_of_a_prompt(form: str, tmp_path: Path) -> None:
    """38: prompts that are the beginning of both answers, and conversations."""

    def row(i: int, k: int) -> dict[str, Any]:
        asked, good, bad = f"What is {i}?", f"It is {i}, I say {k} times.", f"No {k}."
        start = f"\n\nHuman: {asked}\n\nAssistant:"
        if form == "implicit":
            return {"chosen": f"{start} {good}", "rejected": f"{start} {bad}"}
        turns = [{"role": "user", "content": asked}]
        sides = [[{"role": "assistant", "content": text}] for text in (good, bad)]
        if form == "conversation":
            return {"prompt": turns, "chosen": sides[0], "rejected": sides[1]}
        return {"chosen": turns + sides[0], "rejected": turns + sides[1]}

    path = write_jsonl(tmp_path / "r.jsonl", [row(i, k) for i in range(40) for k in range(5)])
    held, trained = _held_and_trained(path, tmp_path / "c")
    assert (len(held), len(trained)) == (2, 38)
    assert held.isdisjoint(trained)


def test_what_one_data_set_holds_out_no_other_trains_on(tmp_path: Path) -> None:
    """38: a mixture: drawn prompts and a test split's, in other rows of another data set."""
    a = write_jsonl(tmp_path / "a/r.jsonl", [pair(i) for i in range(100)])
    other = [pair(i, chosen=f" rather {i}", response=None) for i in range(0, 100, 2)]
    b = write_jsonl(tmp_path / "b/r.jsonl", other)
    write_jsonl(tmp_path / "c/train.jsonl", [pair(i) for i in range(200, 240)])
    write_jsonl(tmp_path / "c/test.jsonl", [pair(i, chosen=" so") for i in range(60, 80)])
    held, trained = _held_and_trained([a, b, tmp_path / "c"], tmp_path / "cache")
    assert held.isdisjoint(trained)
    assert {normalised(pair(i)["prompt"]) for i in range(60, 80)} <= held
    assert 20 <= len(held) <= 20 + 5 + 3


@pytest.mark.parametrize("unseen", [MIN_UNSEEN, MIN_UNSEEN - 1])
def test_a_test_split_that_shares_prompts(unseen: int, tmp_path: Path) -> None:
    """38: the part that shares none is enough from MIN_UNSEEN prompts on; else all, and told."""
    write_jsonl(tmp_path / "d/train.jsonl", [pair(i) for i in range(30)])
    test = [pair(i, chosen=f" so {i}") for i in [*range(10), *range(1000, 1000 + unseen)]]
    write_jsonl(tmp_path / "d/test.jsonl", test)
    data = run(tmp_path / "d", gpt2_like(), tmp_path / "c", part="eval")
    left_out = 10 if unseen == MIN_UNSEEN else 0
    told = {"rows": unseen + 10 - left_out, "prompts": unseen + 10 - left_out}
    assert vars(data.held_out) == told | {"seen": 10 - left_out}
    assert data.report.dropped["held-out row whose prompt is trained on"] == left_out
    again = run(tmp_path / "d", gpt2_like(), tmp_path / "c", part="eval")
    assert again.held_out == data.held_out, "from the cache"
    word = 10 - left_out or "none"
    assert any(f"{word} of them seen in training" in line for line in data.lines("eval"))
    for step in (1, 3):
        same = run(tmp_path / "d", gpt2_like(), tmp_path / "c", step, part="eval")
        assert same.dataset["prompt_ids"] == data.dataset["prompt_ids"]
        assert same.held_out == data.held_out
    steps = [run(tmp_path / "d", gpt2_like(), tmp_path / "c", step) for step in (1, 2, 3)]
    assert sum(one.report.kept for one in steps) == 30, "training rows stay"


NOTHING: dict[str, tuple[dict[str, Any], str]] = {
    "nine rows": (
        {},
        r"data\.eval_fraction 0\.05 of 9 different prompts is none\. Bring more rows",
    ),
    "long prompts": (
        {"eval_fraction": 0.5, "max_prompt_length": 1, "long_prompts": "drop"},
        r"none of the 4 rows that are held out can be used[\s\S]*prompt over the limit: 4",
    ),
}


@pytest.mark.parametrize("case", NOTHING)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_nothing_held_out_is_refused(case: str, step: int, tmp_path: Path) -> None:
    """True before impressive: no figure comes from no rows, unless that is asked for."""
    settings, reason = NOTHING[case]
    path = write_jsonl(tmp_path / "r.jsonl", [pair(i) for i in range(9)])
    for _ in range(2):  # the second time a cache could answer
        with pytest.raises(DataError, match=reason) as error:
            run(path, gpt2_like(), tmp_path / "c", step, part="eval", **settings)
    assert "set data.eval_fraction=0" in str(error.value)
    assert error.value.exit_code == 3
    asked = run(path, gpt2_like(), tmp_path / "c", step, part="eval", eval_fraction=0)
    assert vars(asked.held_out) == {"rows": 0, "prompts": 0, "seen": 0}
    assert asked.lines("eval")[-1] == "eval data: no held-out rows: nothing is measured"


def test_a_test_split_without_usable_rows_is_refused(tmp_path: Path) -> None:
    """eval_fraction=0 does not ask for a run without evaluation where there is a test split."""
    write_jsonl(tmp_path / "d/train.jsonl", [pair(i) for i in range(9)])
    write_jsonl(tmp_path / "d/test.jsonl", [pair(99, prompt="word " * 300)])
    for fraction in (0, 0.05):
        with pytest.raises(DataError, match=r"take the test split out of data\.path and set"):
            run(tmp_path / "d", gpt2_like(), tmp_path / "c", part="eval", long_prompts="drop",
                eval_fraction=fraction)  # fmt: skip


def test_the_sample_data_holds_out_prompts(tmp_path: Path) -> None:
    data = run("sample:courtesy", gpt2_like(), tmp_path, 3, part="eval")
    assert vars(data.held_out) == {"rows": 400, "prompts": 103, "seen": 0}


@needs_shared("../cases")
def test_cases(tmp_path: Path) -> None:
    held, trained = _held_and_trained(CASES / "many_pairs_per_prompt.jsonl", tmp_path)
    assert (len(held), len(trained)) == (2, 38)
    assert held.isdisjoint(trained)
    with pytest.raises(DataError, match="of 9 different prompts is none"):
        run(CASES / "nine_rows.jsonl", gpt2_like(), tmp_path, part="eval")


@needs_shared("pandalm")
def test_pandalm(tmp_path: Path) -> None:
    """894 rows of 158 prompts: rows of one prompt used to be spread over training and held-out."""
    settings: dict[str, Any] = {"prompt_format": "{instruction}\n{input}", "max_bad_rows": 894}
    rows = [json.loads(line) for line in (SHARED / "pandalm/pairs.jsonl").open()]
    prompts = {normalised(f"{row['instruction']}\n{row['input']}") for row in rows}
    held, trained = _held_and_trained(SHARED / "pandalm", tmp_path, **settings)
    assert held | trained == prompts
    assert held.isdisjoint(trained)
    assert len(held) == round(0.05 * len(prompts))


@needs_shared("movie_sentiment")
def test_film_reviews_have_few_prompts(tmp_path: Path) -> None:
    """Twenty paraphrases of one question: nothing can be disjoint, and that is told."""
    for step in (1, 2, 3):
        data = run(SHARED / "movie_sentiment", gpt2_like(), tmp_path, step, part="eval")
        assert vars(data.held_out) == {"rows": 400, "prompts": 20, "seen": 20}
    assert data.lines("eval")[-1] == (
        "eval data: 400 held-out rows with 20 different prompts, all of them seen in training"
    )
