"""What ../shared/cases/EXPECT.md asks of columns, roles, labels and content, row by row.

Each case runs on rows of our own and on the shared file; what is right is computed from the row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.sample import Sample
from rlhf.errors import ConfigError, DataError
from tests.unit.data_help import gpt2_like, run, smollm_like, write_jsonl
from tests.unit.shapes_help import A, H, read, turn

SHARED = Path(__file__).parents[3] / "shared" / "cases" / "data"
ROWS = 24
Row = dict[str, Any]
Texts = dict[str, str]


@dataclass(frozen=True)
class Case:
    """Rows of one shape: ours, the samples of a row (chat text), and what is said."""

    row: Callable[[int], Row]
    want: Callable[[Row], list[Texts]]
    said: str


def ask(i: int) -> str:
    return f"Where does the ferry {i} go to, please?"


def good(i: int) -> str:
    return f"It goes to island {i}."


def bad(i: int) -> str:
    return f"Ask somebody else about {i}."


def chat(user: str, **answers: str) -> list[Texts]:
    """One user turn and its answers, as the human_assistant template writes them."""
    return [{"prompt": f"{H} {user}{A}", **{name: f" {text}" for name, text in answers.items()}}]


def turns_text(messages: list[Row]) -> str:
    """Independent of the template: marks before every turn."""
    marks = {"user": f"{H} ", "assistant": f"{A} ", "system": ""}
    return "".join(marks[one["role"]] + one["content"] for one in messages)


def labelled(i: int) -> Row:
    answers = [bad(i), good(i)] if i % 3 == 1 else [good(i), bad(i)]
    return {"prompt": ask(i), "response 1": answers[0], "response 2": answers[1], "label": i % 3}


def labelled_pair(row: Row) -> list[Texts]:
    if row["label"] == 2:
        return []
    better, worse = ("response 1", "response 2")[:: 1 if row["label"] == 0 else -1]
    return [{"prompt": row["prompt"], "chosen": row[better], "rejected": row[worse]}]


def whole(i: int, answer: str) -> list[Row]:
    return [*turn(ask(i), "user"), *turn(answer)]


CASES: dict[str, Case] = {
    "prompt_inside_answers": Case(
        lambda i: {
            "prompt": f"{H} {ask(i)}{A}",
            "chosen": f"{H} {ask(i)}{A} {good(i)}",
            "rejected": f"{H} {ask(i)}{A} No.",
        },
        lambda row: [
            {k: row[k][0 if k == "prompt" else len(row["prompt"]) :] for k in row},
        ],
        "every answer begins with its prompt, which is taken off",
    ),
    "prompt_list_and_full_chosen": Case(
        lambda i: {
            "prompt": turn(ask(i), "user"),
            "chosen": whole(i, good(i)),
            "rejected": whole(i, bad(i)),
        },
        lambda row: chat(
            row["prompt"][0]["content"],
            chosen=row["chosen"][1]["content"],
            rejected=row["rejected"][1]["content"],
        ),
        "read as pairs: prompt, chosen, rejected",
    ),
    "ultrafeedback_style": Case(
        lambda i: {
            "prompt": ask(i),
            "prompt_id": str(i),
            "chosen": whole(i, good(i)),
            "rejected": whole(i, bad(i)),
            "messages": whole(i, good(i)),
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        },
        lambda row: chat(
            row["prompt"],
            chosen=row["chosen"][1]["content"],
            rejected=row["rejected"][1]["content"],
        ),
        "not used: prompt_id, messages, score_chosen, score_rejected",
    ),
    "sharegpt_pairs": Case(
        lambda i: {
            "conversations": [{"from": "human", "value": ask(i)}],
            "chosen": {"from": "gpt", "value": good(i)},
            "rejected": {"from": "gpt", "value": bad(i)},
        },
        lambda row: chat(
            row["conversations"][0]["value"],
            chosen=row["chosen"]["value"],
            rejected=row["rejected"]["value"],
        ),
        "read as pairs: chosen, rejected, conversations -> messages",
    ),
    "roles_human_gpt": Case(
        lambda i: {"messages": [*turn(ask(i), "human"), *turn(good(i), "gpt")]},
        lambda row: chat(row["messages"][0]["content"], response=row["messages"][1]["content"]),
        "read as conversation: messages",
    ),
    "alpaca_small": Case(
        lambda i: {"instruction": "Say where to.", "input": ask(i), "output": good(i)},
        lambda row: chat(f"{row['instruction']}\n{row['input']}", response=row["output"]),
        "read as alpaca: instruction + input -> prompt, output -> response",
    ),
    "prompt_completion": Case(
        lambda i: {"prompt": ask(i), "completion": good(i)},
        lambda row: [{"prompt": row["prompt"], "response": row["completion"]}],
        "read as prompt_completion: prompt, completion -> response",
    ),
    "labelled_pairs": Case(labelled, labelled_pair, "read as labelled_pairs: prompt, response 1"),
    "ranked": Case(
        lambda i: {"prompt": ask(i), "responses": [bad(i), good(i)], "scores": [1, 4]},
        lambda row: [
            {
                "prompt": row["prompt"],
                "chosen": row["responses"][row["scores"].index(max(row["scores"]))],
                "rejected": row["responses"][row["scores"].index(min(row["scores"]))],
            }
        ],
        "read as ranked: prompt, responses -> answers, scores",
    ),
    "list_of_rejected": Case(
        lambda i: {"prompt": ask(i), "chosen": good(i), "rejected": [bad(i), "No."]},
        lambda row: [{**row, "rejected": one} for one in row["rejected"]],
        "read as pairs",
    ),
    "webgpt_local": Case(
        lambda i: {
            "question": {"full_text": ask(i), "dataset": "x"},
            "answer_0": good(i),
            "answer_1": bad(i),
            "score_0": 0.5,
            "score_1": -0.5,
        },
        lambda row: chat(
            row["question"]["full_text"], chosen=row["answer_0"], rejected=row["answer_1"]
        ),
        "read as scored_pairs",
    ),
    "summ_comparisons": Case(
        lambda i: {
            "info": {"post": ask(i), "title": "t"},
            "summaries": [{"text": bad(i)}, {"text": good(i)}],
            "choice": 1,
        },
        lambda row: chat(
            row["info"]["post"],
            chosen=row["summaries"][row["choice"]]["text"],
            rejected=row["summaries"][1 - row["choice"]]["text"],
        ),
        "read as comparisons",
    ),
    "scored_margin_str": Case(
        lambda i: {"prompt": ask(i), "chosen": good(i), "rejected": bad(i), "margin": "1.5"},
        lambda row: [{k: row[k] for k in ("prompt", "chosen", "rejected")}],
        "margin -> margin (used with step2.margin=column)",
    ),
    "conv_system_mid": Case(
        lambda i: {
            "messages": [*turn(ask(i), "user"), *turn("Answer shortly.", "system"), *turn(good(i))]
        },
        lambda row: chat(
            "\n\n".join(one["content"] for one in row["messages"][:2]),
            response=row["messages"][2]["content"],
        ),
        "read as conversation",
    ),
    "multi_turn": Case(
        lambda i: {
            "messages": [
                *turn("Be kind.", "system"),
                *whole(i, good(i)),
                *turn("Why?", "user"),
                *turn("So."),
            ]
        },
        lambda row: [
            {
                "prompt": turns_text(row["messages"][:-1]) + A,
                "response": " " + row["messages"][-1]["content"],
            }
        ],
        "read as conversation",
    ),
    "content_parts": Case(
        lambda i: {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": ask(i)}]},
                {"role": "assistant", "content": [{"type": "text", "text": good(i)}]},
            ]
        },
        lambda row: chat(
            *(one["content"][0]["text"] for one in row["messages"][:1]),
            response=row["messages"][1]["content"][0]["text"],
        ),
        "read as conversation",
    ),
    "reasoning": Case(
        lambda i: {
            "messages": [
                *turn(ask(i), "user"),
                {"role": "assistant", "content": good(i), "reasoning_content": "I know that."},
            ]
        },
        lambda row: chat(row["messages"][0]["content"], response=row["messages"][1]["content"]),
        "reasoning_content of the messages is not used: the chat template does not know it",
    ),
    "orca_style": Case(
        lambda i: {"system": "Sing.", "question": ask(i), "chosen": good(i), "rejected": bad(i)},
        lambda row: [
            {**one, "prompt": row["system"] + one["prompt"]}
            for one in chat(row["question"], chosen=row["chosen"], rejected=row["rejected"])
        ],
        "read as pairs: system + question -> prompt, chosen, rejected",
    ),
    "rejected_empty": Case(
        lambda i: {"prompt": ask(i), "chosen": good(i), "rejected": ""},
        lambda row: [row],
        "rejected is empty in 24 of the first 24 rows: left out",
    ),
}
CASES["prompt_text_and_full_chosen"] = CASES["prompt_inside_answers"]


def shared(name: str) -> Path:
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"../shared/cases/data/{name}.jsonl is not here")
    return path


def texts(sample: Sample) -> Texts:
    names = ("prompt", "response", "chosen", "rejected")
    return {name: value for name in names if (value := getattr(sample, name)) is not None}


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "shared"])
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, ours: bool, tmp_path: Path) -> None:
    case = CASES[name]
    rows = [case.row(i) for i in range(ROWS)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows) if ours else shared(name)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    samples, reasons, said = read(path)
    assert [texts(one) for one in samples] == [want for row in rows for want in case.want(row)]
    assert case.said in "\n".join(said)
    ties = sum(not case.want(row) for row in rows)
    assert reasons == ["a tie: neither answer is better"] * ties


KTO: Callable[[int], Row] = lambda i: {"messages": whole(i, bad(i)), "label": i % 2 == 0}
CALL = {"type": "function", "function": {"name": "look", "arguments": '{"ferry": 1}'}}


def tools(i: int, content: str | None = "", **more: Any) -> Row:
    call = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    return {"messages": [*turn(ask(i), "user"), call, *turn("2", "tool"), *turn(good(i))], **more}


REFUSED: dict[str, tuple[Callable[[int], Row], str]] = {
    "kto_labels": (
        KTO,
        r"columns messages, label: .* bad ones too.*data\.ignore_columns=\[label\]",
    ),
    "tool_calls_openai": (
        lambda i: tools(i, tools=[CALL]),
        r"tool_calls, which the chat template .*data\.template=",
    ),
    "tool_calls_null_content": (lambda i: tools(i, None), r"tool_calls, which the chat template "),
}


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "shared"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, ours: bool, tmp_path: Path) -> None:
    row, match = REFUSED[name]
    rows = [row(i) for i in range(ROWS)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows) if ours else shared(name)
    with pytest.raises((ConfigError, DataError), match=match):
        read(path)


KNOWS_TOOLS = """\
{%- for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{%- if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}
{%- for call in message.tool_calls or [] %}!{{ call.function.name }}
{{- call.function.arguments | tojson }}{% endfor %}
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_a_template_that_knows_tools_renders_them(tmp_path: Path) -> None:
    """Calls, results and the tools themselves; arguments as an object, not as quoted text."""
    path = write_jsonl(tmp_path / "r.jsonl", [tools(1, None, tools=[CALL])])
    ((sample,), _, said) = read(path, template=KNOWS_TOOLS)
    call = '!look{"ferry": 1}'
    assert sample.prompt == f"[look]<user>{ask(1)}<assistant>{call}<tool>2<assistant>"
    assert sample.response == good(1)
    assert said == [f"{path}: read as conversation: messages, tools"]
    reasoning = CASES["reasoning"].row(1)
    ((sample,), _, said) = read(
        write_jsonl(tmp_path / "s.jsonl", [reasoning]), template=KNOWS_TOOLS
    )
    assert sample.response == f"{good(1)}(I know that.)"
    assert len(said) == 1


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "shared"])
def test_ends_with_user(ours: bool, tmp_path: Path) -> None:
    """Steps 1 and 2 say why; step 3 needs the prompt alone."""
    rows = [{"messages": [*whole(i, good(i)), *turn("Why?", "user")]} for i in range(ROWS)]
    path = write_jsonl(tmp_path / "r.jsonl", rows) if ours else shared("ends_with_user")
    for step in (1, 2):
        share = {"split": tuple(float(step == n) for n in (1, 2, 3))}
        with pytest.raises(DataError, match=r"ends with a user turn: .*: 2[0-9]"):
            run(path, gpt2_like(), tmp_path / "c", step, **share)
    assert run(path, gpt2_like(), tmp_path / "c", 3, split=(0, 0, 1)).report.bad_rows == 0


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "shared"])
def test_rejected_empty(ours: bool, tmp_path: Path) -> None:
    """Counted by file and line, and what follows; step 1 learns the chosen answers."""
    rows = [CASES["rejected_empty"].row(i) for i in range(ROWS)]
    path = write_jsonl(tmp_path / "r.jsonl", rows) if ours else shared("rejected_empty")
    with pytest.raises(DataError) as caught:
        run(path, gpt2_like(), tmp_path / "c", 2, split=(0, 1, 0), eval_fraction=0)
    assert "column 'rejected' is empty, so the row is left out: 24" in str(caught.value)
    assert f"{path}:" in str(caught.value)
    assert run(path, gpt2_like(), tmp_path / "c", 1, split=(1, 0, 0)).report.bad_rows == 0


def test_roles_are_mapped_for_chatml(tmp_path: Path) -> None:
    """The answer stays an answer with every template."""
    rows = [CASES["roles_human_gpt"].row(1)]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    ((sample,), _, _) = read(path, smollm_like(), template="chatml")
    assert sample.prompt == f"<|im_start|>user\n{ask(1)}<|im_end|>\n<|im_start|>assistant\n"
    assert sample.response == f"{good(1)}<|im_end|>\n"


def test_margins_as_text(tmp_path: Path) -> None:
    """Ignored unless asked for; then read as numbers, or counted as bad."""
    rows = [CASES["scored_margin_str"].row(i) for i in range(12)]
    rows[3]["margin"] = "large"
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    settings: dict[str, Any] = {"split": (0, 1, 0), "eval_fraction": 0}
    assert run(path, gpt2_like(), tmp_path / "c", **settings).report.kept == 12
    data = run(path, gpt2_like(), tmp_path / "c", margins=True, **settings)
    assert data.report.bad == {"column 'margin' is missing or not a number": (1, [f"{path}:4"])}
    assert data.dataset["margin"][:] == [1.5] * 11


def test_pairs_of_one_row_are_counted(tmp_path: Path) -> None:
    """Each row, and each pair beyond a row's first, is in exactly one count."""
    rows = [
        {"prompt": ask(i), "responses": ["a", "b", "c", "d"], "scores": [3, 1, 3, i % 4]}
        for i in range(20)
    ]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    report = run(path, gpt2_like(), tmp_path / "c", split=(0, 1, 0), eval_fraction=0).report
    # d is worse than 3 in three of four rows.
    assert (report.read, report.extra, report.kept) == (20, 15, 35)
    assert "20 rows read (and 15 pairs more, from several answers a row): 35 kept" in "\n".join(
        report.lines()
    )
