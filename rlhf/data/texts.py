"""All text of a data set, for training a tokenizer on."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.config.schema import DataConfig
from rlhf.data.shapes import ANSWERS, Reader, shapes_of
from rlhf.data.sources import BadRow, open_data_sets
from rlhf.data.templates import Messages


def texts(data: DataConfig) -> Iterator[str]:
    """Every prompt and answer that the steps read, in the order of the rows."""
    for one in open_data_sets(data):
        readers = {
            part.name: Reader(shape, data)
            for shape, parts in shapes_of(one, data)
            for part in parts
        }
        for part in one.parts:
            reader = readers[part.name]
            for _, row in part.rows():
                if isinstance(row, BadRow):
                    continue
                try:
                    examples = reader(row)
                except BadRow:
                    continue
                for example in examples:
                    yield from _strings(example.prompt)
                    for name in ANSWERS:
                        yield from _strings(example.answers.get(name))


def _strings(value: str | Messages | None) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        yield from (turn["content"] for turn in value or ())
