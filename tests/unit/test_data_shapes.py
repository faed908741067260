"""Shapes of rows: found from the columns, said, or refused with what to type."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.schema import DataConfig
from rlhf.data.shapes import SHAPES, SLOTS, Reader, detect
from rlhf.data.shapes.base import PAIRS
from rlhf.data.shapes.cells import decode
from rlhf.data.shapes.turns import ROLES, turns
from rlhf.data.sources.base import BadRow, NoPreference
from rlhf.data.split import prompt_key
from rlhf.errors import ConfigError, DataError
from tests.unit.data_help import SHARED, gpt2_like, needs_shared, run, write_jsonl
from tests.unit.shapes_help import A, H, read, read_rows, turn

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
Row = dict[str, Any]


def shape_name(row: Row, **settings: Any) -> str:
    return detect(list(row), [row], DataConfig(**settings)).kind.name


def examples(row: Row, **settings: Any) -> list[Any]:
    data = DataConfig(**settings)
    return Reader(detect(list(row), [row], data), data)(row)


def pair(**more: Any) -> Row:
    return {"prompt": "p", "chosen": "c", "rejected": "r", **more}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (pair(), "pairs"),
        ({"chosen": "it is a", "rejected": "it is b"}, "pairs"),
        ({"prompt": "p", "response": "r"}, "prompt_completion"),
        ({"question": "p", "answer": "r"}, "prompt_completion"),
        ({"instruction": "p", "response": "r", "context": "c", "category": "x"}, "alpaca"),
        ({"input": "p", "output": "r"}, "prompt_completion"),
        ({"prompt": "p"}, "prompts"),
        ({"query": "p"}, "prompts"),
        ({"messages": [*turn("q", "user"), *turn("a")]}, "conversation"),
        ({"question": "q", "answers": [{"text": "a", "rank": 2}, {"text": "b", "rank": 1}]},
         "ranked"),
        ({"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1,
          "safer_response_id": 0}, "labelled_pairs"),
    ],
)  # fmt: skip
def test_found_by_columns(row: Row, name: str) -> None:
    assert shape_name(row) == name


def test_labels_that_say_which() -> None:
    """Public conventions, words, and numbers that are the columns' own; nothing else is guessed."""
    known: list[tuple[str, str, str, dict[Any, str]]] = [
        ("response 1", "response 2", "label", {0: "a", 1: "b", 2: ""}),
        ("human_ref_A", "human_ref_B", "labels", {1: "a", 0: "b"}),
        ("response1", "response2", "overall_preference", {-3: "a", -1: "a", 0: "", 2.0: "b"}),
        ("response_0", "response_1", "better_response_id", {0: "a", 1: "b"}),
        ("response_1", "response_2", "label", {1: "a", "2": "b"}),
        ("response_a", "response_b", "winner", {"A": "a", "model_b": "b", "tie": ""}),
        ("answer_a", "answer_b", "choice", {"answer_a": "a", "second": "b"}),
    ]
    for first, second, label, meanings in known:
        rows = [{"prompt": "p", first: "a", second: "b", label: value} for value in meanings]
        data = DataConfig()
        reader = Reader(detect(list(rows[0]), rows, data), data)
        for row, better in zip(rows, meanings.values(), strict=True):
            if better:
                (one,) = reader(row)
                worse = {"a": "b", "b": "a"}[better]
                assert one.answers == {"chosen": better, "rejected": worse}, (label, row)
            else:
                with pytest.raises(NoPreference):
                    reader(row)


@pytest.mark.parametrize(
    ("first", "second", "values"),
    [
        ("response1", "response2", [0, 1, 2]),  # PandaLM: 0 is a tie; elsewhere it is the first
        ("response_1", "response_2", [0, 1]),
        ("answer_a", "answer_b", [0, 1]),
        ("answer_a", "answer_b", [True, False]),
        ("answer_a", "answer_b", ["good", "bad"]),
    ],
)
def test_labels_that_do_not_say_which(first: str, second: str, values: list[Any]) -> None:
    rows = [{"prompt": "p", first: "a", second: "b", "label": value} for value in values]
    with pytest.raises(DataError, match=r"is not certain. Say it, .*data\.labels\.\w+=first"):
        detect(list(rows[0]), rows, DataConfig())
    meaning: Any = {str(values[0]): "second", str(values[1]): "first", "2": "tie"}
    data = DataConfig(labels=meaning)
    (one,) = Reader(detect(list(rows[0]), rows, data), data)(rows[0])
    assert one.answers == {"chosen": "b", "rejected": "a"}


def test_a_label_that_comes_late(tmp_path: Path) -> None:
    """Counted as bad, with what to type."""
    rows = [
        {"prompt": f"p{i}", "response_a": "a", "response_b": "b", "label": "a"} for i in range(1001)
    ]
    rows[1000]["label"] = "unsure"
    samples, reasons, _ = read_rows(tmp_path, rows)
    assert len(samples) == 1000
    assert reasons == [
        "column 'label' is 'unsure', which has no meaning: data.labels.unsure=first, second or tie"
    ]


def test_ranked_answers() -> None:
    """The best against each that is worse, by scores, ranks, or the answers' own."""
    for row in (
        {"prompt": "p", "responses": ["b", "a", "c"], "scores": [2, 5, 1]},
        {"prompt": "p", "completions": ["b", "a", "c"], "rank": [2, 1, 3]},
        {"prompt": "p", "answers": [{"answer": t, "rank": n} for t, n in zip("bac", (2, 1, 3))]},  # noqa: B905
        {"prompt": "p", "responses": [
            {"response": t, "overall_score": n} for t, n in zip("bac", (2, 3, 1))]},  # noqa: B905
    ):  # fmt: skip
        found = [one.answers for one in examples(row)]
        assert found == [{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "c"}]
    ties = {"prompt": "p", "responses": ["b", "a", "c"], "scores": [2, 2, 1]}
    assert [one.answers for one in examples(ties)] == [{"chosen": "b", "rejected": "c"}]
    with pytest.raises(NoPreference, match="rated alike"):
        examples({"prompt": "p", "responses": ["b", "a"], "scores": [2, 2]})
    with pytest.raises(DataError, match="not one number for each of 2"):
        examples({"prompt": "p", "responses": ["b", "a"], "scores": [2]})


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=6))
def test_every_pair_of_a_ranking_is_right(scores: list[int]) -> None:
    row = {"prompt": "p", "responses": [f"{i}:{s}" for i, s in enumerate(scores)], "scores": scores}
    best = max(scores)
    if min(scores) == best:
        with pytest.raises(NoPreference):
            examples(row)
        return
    found = [one.answers for one in examples(row)]
    assert len(found) == sum(s < best for s in scores)
    assert len({one["rejected"] for one in found}) == len(found)
    for one in found:
        assert int(one["chosen"].split(":")[1]) == best > int(one["rejected"].split(":")[1])


@pytest.mark.parametrize(
    ("column", "value"),
    [("label", 1), ("system", "x"), ("tools", "[1]"), ("images", ["x.png"]), ("input", "1 + 1"),
     ("score", 3), ("choices", ["a"]), ("tool_calls", [1]), ("response_a", "x"), ("rank", 1)],
)  # fmt: skip
def test_a_column_that_changes_the_meaning(column: str, value: Any, tmp_path: Path) -> None:
    """Used, or refused with the columns found and the way on."""
    row = pair(**{column: value})
    if column == "system":
        (one,) = examples(row)
        assert [t["role"] for t in one.prompt] == ["system", "user"]
        return
    with pytest.raises(DataError) as caught:
        detect(list(row), [row], DataConfig())
    assert f"data.ignore_columns=[{column}]" in str(caught.value)
    assert f"prompt, chosen, rejected, {column}" in str(caught.value)
    (one,) = examples(row, ignore_columns=[column])
    assert one.answers == {"chosen": "c", "rejected": "r"}
    # Empty ones mean nothing, until one that is not comes.
    rows = [pair(prompt=f"p{i}", **{column: type(value)()}) for i in range(1002)]
    rows = [{**one, column: None} for one in rows]
    assert len(read_rows(tmp_path, rows)[0]) == 1002
    rows[1001][column] = value
    with pytest.raises(DataError, match=f"column '{column}' may change"):
        read_rows(tmp_path, rows)


def test_a_column_that_comes_late(tmp_path: Path) -> None:
    rows: list[Row] = [pair(prompt=f"p{i}") for i in range(1001)]
    rows[1000]["id"] = 7
    _, _, said = read_rows(tmp_path, rows)
    assert said[-1] == "not used either: id"
    rows[1000]["images"] = ["x.png"]
    with pytest.raises(DataError, match="column 'images' may change what a row means"):
        read_rows(tmp_path, rows)


def test_no_shape_fits() -> None:
    with pytest.raises(DataError, match=r"columns title, body\. .*data\.columns\.prompt=title"):
        detect(["title", "body"], [], DataConfig())
    with pytest.raises(ConfigError, match=r"chosen=chosn: .* has prompt, chosen"):
        detect(["prompt", "chosen"], [], DataConfig(columns={"chosen": "chosn"}))
    with pytest.raises(ConfigError, match="'ranked' needs answers; data has the columns prompt"):
        detect(["prompt", "chosen"], [], DataConfig(format="ranked"))
    with pytest.raises(
        DataError, match=r"none of the first 2 rows .*unknown role 'narrator'; known: .*\(2\)"
    ):
        detect(["messages"], [{"messages": turn("q", "narrator")}] * 2, DataConfig())


def test_input_is_part_of_the_prompt() -> None:
    """Also where `instruction` is mapped; a column called prompt may have it in it already."""
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (one,) = examples(row)
    assert one.prompt == [{"role": "user", "content": "Add.\n1 2"}]
    (one,) = examples({**row, "input": ""})
    assert one.prompt == [{"role": "user", "content": "Add."}]
    columns = {"prompt": "instruction", "response": "output"}
    (one,) = examples(row, columns=columns)
    assert (one.prompt, one.answers) == ("Add.\n1 2", {"response": "3"})
    with pytest.raises(DataError, match=r"'input' may .*\[input\]"):
        examples(row, prompt_format="{instruction}")
    (one,) = examples(row, prompt_format="{instruction}: {input}", response_format=" {text}")
    assert (one.prompt, one.answers) == ("Add.: 1 2", {"response": "3"})
    (one,) = examples({"prompt": "p", **row}, columns={"input": "input"})
    assert one.prompt == "p\n1 2"


def test_system_prompts() -> None:
    """A message of conversations; before a text that is a dialogue already; never twice."""
    ask = turn("q", "user")
    (one,) = examples({"system": "S", "messages": [*ask, *turn("a")]})
    assert one.prompt == [{"role": "system", "content": "S"}, *ask]
    (one,) = examples(pair(prompt=f"{H} q{A}", system="S"))
    assert one.prompt == f"S{H} q{A}"
    same = [{"role": "system", "content": "S"}, *ask]
    (one,) = examples({"system": "S", "messages": [*same, *turn("a")]})
    assert one.prompt == same
    with pytest.raises(DataError, match="says something else"):
        examples({"system": "T", "messages": [*same, *turn("a")]})


def test_some_answers_begin_with_the_prompt(tmp_path: Path) -> None:
    """All: taken off. None: nothing. A mixture is refused and asks; two words are no evidence."""

    def row(i: int, repeated: bool) -> Row:
        start = f"tell me about number {i}" if repeated else ""
        return {
            "prompt": f"tell me about number {i}",
            "chosen": f"{start} c",
            "rejected": f"{start} r",
        }

    mixed = [row(i, i % 2 == 0) for i in range(10)]
    with pytest.raises(DataError, match=r"in 5 of 10 rows .*prompt_in_answers=strip .*=keep"):
        read_rows(tmp_path, mixed)
    samples, _, _ = read_rows(tmp_path, mixed, prompt_in_answers="strip")
    assert {one.chosen for one in samples} == {" c"}
    samples, _, _ = read_rows(tmp_path, mixed, prompt_in_answers="keep")
    assert [one.chosen for one in samples[:2]] == ["tell me about number 0 c", " c"]
    for late in (True, False):
        rows = [row(i, not late) for i in range(1000)] + [row(1000, late)]
        with pytest.raises(DataError, match=r"in 1(000)? of 1001 rows"):
            read_rows(tmp_path, rows)
    samples, _, said = read_rows(tmp_path, [pair(prompt="Hi", chosen="Hi you", rejected="Hi?")])
    assert (samples[0].chosen, len(said)) == ("Hi you", 1)


def test_each_file_has_its_shape(tmp_path: Path) -> None:
    """A file of conversations beside pairs; test prompts go with the rows that they are of."""
    write_jsonl(tmp_path / "d/chats.jsonl", [{"messages": [*turn("q", "user"), *turn("a")]}])
    write_jsonl(tmp_path / "d/pairs.jsonl", [{"q": "p", "chosen": "c", "rejected": "r"}])
    write_jsonl(tmp_path / "d/test.jsonl", [{"q": "other"}])
    samples, reasons, said = read(tmp_path / "d", columns={"prompt": "q"})
    assert reasons == []
    assert sorted(one.prompt for one in samples) == [f"{H} q{A}", "other", "p"]
    assert [line.split(": ")[1] for line in said] == ["read as pairs", "read as conversation"]
    with pytest.raises(ConfigError, match="has no column 'qq'"):
        read(tmp_path / "d", columns={"prompt": "qq"})


def test_csv_cells_with_conversations(tmp_path: Path) -> None:
    """JSON and Python's own writing; a printed numpy array is refused with the reason."""
    ask, answer = turn('it\'s "q"', "user"), turn("a")
    for write in (json.dumps, repr):
        path = tmp_path / "r.csv"
        with path.open("w", newline="") as stream:
            lines = csv.writer(stream)
            lines.writerow(["prompt", "chosen", "rejected"])
            lines.writerow([write(ask), write([*ask, *answer]), write(turn("r"))])
        ((sample,), _, _) = read(path)
        assert sample.prompt == f'{H} it\'s "q"{A}'
        assert (sample.chosen, sample.rejected) == (" a", " r")
        with path.open("w", newline="") as stream:
            lines = csv.writer(stream)
            lines.writerow(["prompt", "responses", "scores"])
            lines.writerow(["[p]", write(["a", "b"]), "[1, 2.5]"])
        ((sample,), _, _) = read(path)
        assert (sample.prompt, sample.chosen, sample.rejected) == ("[p]", "b", "a")
    numpy = "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"
    for text in (numpy, f"array({numpy}, dtype=object)"):
        with pytest.raises(DataError, match=r"lost its commas.*parquet"):
            examples({"messages": text})


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


@given(st.text("[]{}()'\", \\x0a1", max_size=60))
def test_any_cell_is_read_or_bad(text: str) -> None:
    try:
        value = decode(text, "x")
    except BadRow:
        return
    if _is_json(value):
        assert decode(json.dumps(value), "x") == value


def test_cells_have_limits() -> None:
    for text in ("(" * 60 + ")" * 60, "'" + "a" * (1 << 21) + "'", "__import__('os')", "1" * 9000):
        with pytest.raises(BadRow):
            decode(text if text[0] != "1" else f"x{text}", "x")


@pytest.mark.parametrize("role", ROLES)
def test_roles_are_mapped(role: str) -> None:
    for message in ({"role": role, "content": "x"}, {"from": role, "value": "x"}):
        assert turns([message], "c") == [{"role": ROLES[role], "content": "x"}]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "narrator", "content": "x"}, "unknown role 'narrator'; known: user, human"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "type 'image_url'; only text"),
        ({"role": "user", "content": [7]}, "type 'int'"),
        ({"role": "assistant", "content": "x", "weight": 0}, "'weight', which is not supported"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "'function_call'"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "lacks the function's name"),
        ({"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "{"}}]}, "broken JSON"),
        ({"role": "user"}, "lacks content"),
        ({"content": "x"}, "lacks role"),
    ],
)  # fmt: skip
def test_messages_that_are_not_understood(message: Row, reason: str) -> None:
    with pytest.raises(BadRow, match=re.escape(reason)):
        turns([message], "c")


def test_a_message_that_the_template_leaves_out(tmp_path: Path) -> None:
    """A template without a branch for a role may not lose what it says."""
    users = "{% for m in messages if m.role != 'system' %}<{{ m.content }}>{% endfor %}"
    rows = [{"messages": [*turn("S", "system"), *turn("q", "user"), *turn("a")]}]
    _, reasons, _ = read_rows(tmp_path, rows, template=users)
    assert reasons == ["the template leaves out a message of role 'system'"]


def test_keys_are_free_of_templates(tmp_path: Path) -> None:
    """The split by prompts is the same whatever renders them."""
    rows = [{"prompt": turn("q", "user"), "chosen": turn("a"), "rejected": turn("b")}]
    ((one,), _, _) = read_rows(tmp_path, rows)
    ((two,), _, _) = read_rows(tmp_path, rows, template="{{ messages[0].content }}|x")
    assert one.prompt_key == two.prompt_key == prompt_key("q")
    assert one.prompt != two.prompt
    assert one.key == two.key


def test_tables_agree() -> None:
    """The schema's names are the table's; slots are known; the page shows the table."""
    names = get_args(DataConfig.model_fields["format"].annotation)
    assert set(names) - {"auto"} == {name for name, kind in SHAPES.items() if kind.read}
    for kind in SHAPES.values():
        for need in (*kind.needs, *kind.may):
            assert set(need.split("|")) <= SLOTS.keys()
    assert all(len(set(pair)) == 2 for pair in PAIRS)
    text = PAGE.read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.M))
    for kind in SHAPES.values():
        needs = ", ".join(" or ".join(f"`{s}`" for s in n.split("|")) for n in kind.needs)
        assert shown[kind.name] == needs, kind.name
    for slot, columns in SLOTS.items():
        if columns:
            assert shown[slot] == ", ".join(f"`{name}`" for name in columns), slot
    for role in ROLES:
        assert f"`{role}`" in text


def test_no_torch() -> None:
    """The checks before a run find shapes without it."""
    code = (
        "import sys, rlhf.data.shapes; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@needs_shared("pandalm")
def test_pandalm_by_its_columns(tmp_path: Path) -> None:
    """`input` is read without any setting: prompts of rows with one end with it."""
    path = SHARED / "pandalm"
    samples, reasons, said = read(path)
    assert reasons == ["column 'chosen' is bool, not text"] * 6
    assert said[0].endswith("instruction + input -> prompt, chosen, rejected; not used: agreement")
    lines = (path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["chosen"] is not True]
    for row, sample in zip(rows, samples, strict=True):
        end = f"\n{row['input']}" if row["input"].strip() else ""
        assert sample.prompt == f"{H} {row['instruction']}{end}{A}"
    with pytest.raises(DataError, match="'input' may change"):
        run(path, gpt2_like(), tmp_path, prompt_format="{instruction}")
