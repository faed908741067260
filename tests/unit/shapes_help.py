"""Rows read as the steps read them, without tokenising: for test_data_columns, _shapes, _cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config.schema import DataConfig
from rlhf.data.sample import Sample, SampleMaker
from rlhf.data.shapes import Reader, shapes_of
from rlhf.data.sources import BadRow, open_data_sets
from rlhf.data.templates import render, template_text
from tests.unit.data_help import gpt2_like, write_jsonl

H, A = "\n\nHuman:", "\n\nAssistant:"


def sample_maker(data: DataConfig, tokenizer: Any = None) -> SampleMaker:
    tokenizer = tokenizer or gpt2_like()
    text = template_text(tokenizer, data.template)
    return SampleMaker(
        data,
        lambda turns, gen, tools=None: render(tokenizer, text, turns, generate=gen, tools=tools),
        text,
    )


def read(
    path: Path, tokenizer: Any = None, **settings: Any
) -> tuple[list[Sample], list[str], list[str]]:
    """(samples, reasons of rows that are none, what is said) of a file or folder."""
    data = DataConfig(path=[str(path)], **settings)
    maker = sample_maker(data, tokenizer)
    samples: list[Sample] = []
    reasons: list[str] = []
    said: list[str] = []
    for one in open_data_sets(data):
        for shape, parts in shapes_of(one, data):
            reader = Reader(shape, data)
            for part in parts:
                for where, row in part.rows():
                    try:
                        assert not isinstance(row, BadRow)
                        samples += [maker(example, where) for example in reader(row)]
                    except BadRow as reason:
                        reasons.append(str(reason))
            said += [*reader.finish(), *maker.notes(shape)]
    return samples, reasons, said


def read_rows(tmp_path: Path, rows: list[Any], **settings: Any) -> Any:
    """`read` of rows written as JSON lines."""
    return read(write_jsonl(tmp_path / "rows.jsonl", rows), **settings)


def turn(content: str, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]
