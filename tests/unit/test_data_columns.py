"""Rows to samples: mapping, formats, implicit prompts, conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema import DataConfig
from rlhf.data.sample import Sample
from rlhf.data.shapes import Reader, detect
from rlhf.data.sources.base import BadRow
from rlhf.errors import ConfigError
from tests.unit.data_help import SHARED, gpt2_like, needs_shared, run, smollm_like
from tests.unit.shapes_help import A, H, sample_maker, turn


def make(row: dict[str, Any], tokenizer: Any = None, **settings: Any) -> Sample:
    """The row's sample, by its columns alone."""
    data = DataConfig(**settings)
    (example,) = Reader(detect(list(row), [], data), data)(row)
    return sample_maker(data, tokenizer)(example, "here:1")


def test_rm_static() -> None:
    """C12: our names need no mapping; the text stays as it is (ALGORITHM 4)."""
    row = {"prompt": f"{H} q{A}", "response": " r", "chosen": " c ", "rejected": " x", "margin": 2}
    sample = make(row)
    assert (sample.prompt, sample.response, sample.chosen) == (f"{H} q{A}", " r", " c ")
    assert (sample.rejected, sample.margin, sample.where) == (" x", 2.0, "here:1")


def test_mapping() -> None:
    """C12: other names by data.columns; a name that is not ours is refused."""
    sample = make({"q": "p", "good": "c"}, columns={"prompt": "q", "chosen": "good"})
    assert (sample.prompt, sample.chosen, sample.rejected) == ("p", "c", None)
    with pytest.raises(ConfigError, match=r"prompt=promt: .* no column 'promt'; .* 'prompt'\?"):
        make({"prompt": "p"}, columns={"prompt": "promt"})
    with pytest.raises(ConfigError, match="promt unknown"):
        make({"q": "p"}, columns={"promt": "q"})


def test_formats() -> None:
    """C12, D2: byte-exact; braces in the data are data; odd formats are refused."""
    row = {"instruction": "Add {x}", "input": "1", "chosen": "{text}"}
    sample = make(
        row, prompt_format=f"{H} {{instruction}}\n{{{{{{input}}}}}}{A}", response_format=" {text}"
    )
    assert sample.prompt == f"{H} Add {{x}}\n{{1}}{A}"
    assert sample.chosen == " {text}"
    with pytest.raises(BadRow, match="column 'input' is missing"):
        make({"instruction": "a", "input": None}, prompt_format="{instruction}{input}")
    for bad in ("{", "{}", "{a!r}", "{a:>4}", "no column", "{b}"):
        with pytest.raises(ConfigError, match="prompt_format"):
            make({"a": "x"}, prompt_format=bad)
    for bad in ("text", "{other}", "{text}{text}"):
        with pytest.raises(ConfigError, match="response_format"):
            make({"prompt": "x"}, response_format=bad)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (f"{H} q{A} I see", f"{H} q{A} It is", f"{H} q{A}"),
        (f"{H} q{A} a{H} b{A} c", f"{H} q{A} a{H} b{A} d", f"{H} q{A} a{H} b{A}"),
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),
    ],
)
def test_implicit_prompt(chosen: str, rejected: str, prompt: str) -> None:
    """C12: Anthropic/hh-rlhf's dialogues and trl's example; no word is cut."""
    sample = make({"chosen": chosen, "rejected": rejected})
    assert sample.prompt == prompt
    assert sample.prompt + (sample.chosen or "") == chosen
    assert sample.prompt + (sample.rejected or "") == rejected


def test_implicit_prompt_that_is_not_there() -> None:
    """C12, C14."""
    for chosen, rejected in [("blue", "green"), ("blue", "black"), (turn("a"), turn("b"))]:
        with pytest.raises(BadRow, match="do not begin alike"):
            make({"chosen": chosen, "rejected": rejected})
    with pytest.raises(BadRow, match="not of one type"):
        make({"chosen": "a", "rejected": turn("b")})


def test_conversations() -> None:
    """C12: messages; explicit and implicit conversational pairs, as trl documents them."""
    ask = turn("q", "user")
    sample = make({"messages": [*ask, *turn("a")]})
    assert (sample.prompt, sample.response) == (f"{H} q{A}", " a")
    assert make({"messages": ask}).prompt == f"{H} q{A}"
    explicit = make({"prompt": ask, "chosen": turn("c"), "rejected": turn("r")})
    implicit = make({"chosen": [*ask, *turn("c")], "rejected": [*ask, *turn("r")]})
    for sample in (explicit, implicit):
        assert (sample.prompt, sample.chosen, sample.rejected) == (f"{H} q{A}", " c", " r")


def test_conversation_in_chatml() -> None:
    """C12, ALGORITHM 2: the template's turn end is the eos, so an answer has it once."""
    row = {"prompt": turn("q", "user"), "chosen": turn("c"), "rejected": turn("r")}
    sample = make(row, smollm_like(), template="chatml")
    assert sample.prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert sample.chosen == "c<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": []}, "is an empty list"),
        ({"prompt": ["q"]}, "a message is str"),
        ({"prompt": [{"role": "user", "content": None}]}, "lacks content"),
        ({"prompt": [{"content": "q"}]}, "lacks role"),
        ({"prompt": turn("q", "tool")}, "refused by the template"),
        ({"messages": "text"}, "column 'messages' is str"),
        ({"messages": turn("a")}, "an answer without a prompt"),
        ({"prompt": turn("q", "user"), "chosen": turn("a", "user")}, "does not end with the assis"),
        ({"prompt": "text", "chosen": [1]}, "column 'chosen' is list, not text"),
    ],
)
def test_bad_conversations(row: dict[str, Any], reason: str) -> None:
    """C14."""
    with pytest.raises(BadRow, match=reason):
        make(row)


def test_key_follows_content() -> None:
    """C11: a row's key depends on its content, not on place, template or tokenizer."""
    row = {"prompt": turn("q", "user"), "chosen": turn("c"), "rejected": turn("r")}
    keys = {make(row).key, make(row, smollm_like(), template="chatml").key}
    assert len(keys) == 1
    assert make({**row, "unused": 1}).key in keys
    assert make({**row, "margin": 1}).key not in keys


def test_keys_of_plain_rows_stay() -> None:
    """The split follows the keys: these are of the code before rows had shapes (a576e4c)."""
    row: dict[str, Any] = {"prompt": "p q r", "chosen": " c", "rejected": " r"}
    assert make(row).key == "ee0b19522d68f11395d7332bdb95cf75fb57d16b53bcba347adf9f324a41877d"
    row = {**row, "response": " a", "margin": 2}
    assert make(row).key == "bb9999523227fa0bde2895ad42ff3332f092067438f463b812ba304ee1de4f8c"


def test_margins_matter_where_they_are_asked_for() -> None:
    """Text is a number where it is one; what is none spoils no row by itself."""
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    values = {"1.5": 1.5, 2: 2.0, "big": None, "": None, True: None, "nan": None}
    for value, number in values.items():
        assert make({**row, "margin": value}).margin == number


@needs_shared("pandalm")
def test_pandalm(tmp_path: Path) -> None:
    """C12 on real data: instruction and input into a prompt; 5% held out, the rest in steps."""
    settings: dict[str, Any] = {
        "prompt_format": f"{H} {{instruction}}\n{{input}}{A}",
        "response_format": " {text}",
        "max_prompt_length": 1500,
        "max_length": 4000,
    }
    wanted = [(1, "train"), (2, "train"), (3, "train"), (3, "eval")]
    rows: list[int] = []
    reasons: set[str] = set()
    for step, part in wanted:
        data = run(SHARED / "pandalm", gpt2_like(), tmp_path, step, part=part, **settings)
        report = data.report
        rows.append(report.kept + report.dropped.total() + report.bad_rows - 6)
        reasons |= set(report.bad)
        assert (data.report.read, data.report.duplicates) == (894, 106)
        # Six answers are the JSON value true.
        (count, places) = data.report.bad["column 'chosen' is bool, not text"]
        assert (count, places[0]) == (6, f"{SHARED}/pandalm/pairs.jsonl:140")
    assert len(reasons) == 3
    assert sum(rows) == 888
    unique = 782
    shares = [0.19, 0.38, 0.38, 0.05]
    assert all(abs(n - share * 888) < 0.05 * unique for n, share in zip(rows, shares, strict=True))
