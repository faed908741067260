"""What a label says about two answers: `first`, `second` or `tie`. Guessed nowhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.shapes.table import label_key
from rlhf.errors import DataError

FIRST, SECOND, TIE = "first", "second", "tie"
_TIES = ("tie", "tied", "draw", "equal", "both", "neither", "tie (bothbad)")

# Public data sets whose cards say what the numbers mean: (first answer, label) -> meaning.
KNOWN: dict[tuple[str, str], dict[str, str]] = {
    # GAIR/autoj: the better response's index; 2: tie
    ("response 1", "label"): {"0": FIRST, "1": SECOND, "2": TIE},
    # stanfordnlp/SHP: 1: A is preferred, 0: B
    ("human_ref_A", "labels"): {"1": FIRST, "0": SECOND},
    # nvidia/HelpSteer3: from -3 (the first is much better) to 3
    **{
        (first, "overall_preference"): {
            **{str(n): FIRST for n in (-3, -2, -1)},
            **{str(n): SECOND for n in (1, 2, 3)},
            "0": TIE,
        }
        for first in ("response1", "response_1", "response 1")
    },
}


def meanings(
    first: str, second: str, label: str, found: Sequence[Any], given: Mapping[str, str]
) -> dict[str, str]:
    """Label -> meaning, for labels of two columns.

    In this order: `data.labels`, a data set that is known by its columns, labels that are words
    (`A`, `model_b`, `tie`) or that are the numbers in the columns' names. Raises DataError where a
    label that was found means nothing certain: `1` is the first answer in one data set and the
    second in another.
    """
    keys = sorted({key for one in found if (key := label_key(one)) is not None})
    if given:
        table = {key.lower(): meaning for key, meaning in given.items()}
    elif (first, label) in KNOWN and not set(keys) - set(KNOWN[first, label]):
        table = KNOWN[first, label]
    else:
        table = _by_names(first, second)
    unclear = [key for key in keys if key not in table]
    if unclear:
        example = " ".join(f"data.labels.{key}={first_or}" for key, first_or in _ask(keys))
        raise DataError(
            f"column {label!r} has the labels {', '.join(keys)}; what they say about {first!r} and "
            f"{second!r} is not certain. Say it, for example: {example}"
        )
    return table


def _ask(keys: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(keys, (FIRST, SECOND, *[TIE] * len(keys)), strict=False))


def _by_names(first: str, second: str) -> dict[str, str]:
    table = dict.fromkeys(_TIES, TIE)
    for column, meaning in ((first, FIRST), (second, SECOND)):
        ending = re.split(r"[ _]", column)[-1].lower()
        ending = re.sub(r"^[a-z]+(?=\d$)", "", ending)
        table.update({ending: meaning, column.lower(): meaning, f"model_{ending}": meaning})
        table[meaning] = meaning
    return table
