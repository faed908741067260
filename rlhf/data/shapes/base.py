"""The words of this folder: slots (what a column is to us), kinds of rows, and an `Example`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.templates import Messages

ANSWERS = ("response", "chosen", "rejected")

# What a column can be to us -> the names under which it is found by itself, the likeliest first.
# `data.columns` maps a slot to any other name.
SLOTS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "instruction", "question", "query", "history", "info", "input"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
    "messages": ("messages", "conversations", "conversation"),
    "response": ("response", "completion", "output", "answer"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "margin": ("margin",),
    "first": (),  # found in pairs with `second`: PAIRS
    "second": (),
    "label": (
        "label",
        "labels",
        "choice",
        "winner",
        "preference",
        "overall_preference",
        "better_response_id",
    ),
    "first_score": (),
    "second_score": (),
    "answers": ("responses", "completions", "answers", "candidates", "summaries"),
    "scores": ("scores", "ratings"),
    "ranks": ("ranks", "rank"),
}

# Two answers side by side -> the columns that may hold their scores.
PAIRS: dict[tuple[str, str], tuple[str, str]] = {
    **{
        (f"{name}{gap}{a}", f"{name}{gap}{b}"): (f"score{gap}{a}", f"score{gap}{b}")
        for name in ("response", "answer", "completion", "output", "conversation")
        for a, b in (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"))
        for gap in ("_", " ", "")
    },
    ("human_ref_A", "human_ref_B"): ("score_A", "score_B"),
}

# Columns that change what a row means: used, or the data set is refused. With them go the names of
# the slots in `_TELLING`.
_TELLING = ("input", "system", "tools", "label", "scores", "ranks")
MEANING = frozenset(
    (
        *(name for slot in _TELLING for name in SLOTS[slot]),
        *(name for pair in PAIRS for name in pair),
        *("image", "images", "audio", "audios", "video", "videos", "history"),
        *("tool_calls", "functions", "function_call", "choices", "options", "score", "rating"),
    )
)


@dataclass(frozen=True)
class Example:
    """A prompt and its answers in one form, whatever the columns were called.

    prompt: text as it is, or turns (`role`, `content`, ...) for the chat template.
    answers: `response`, `chosen`, `rejected` as far as the row has them; text, or the turns that
    follow the prompt's. margin: as it is in the row. lacks: why an answer is not there.
    """

    prompt: str | Messages
    answers: dict[str, str | Messages]
    margin: Any = None
    tools: list[Any] | None = None
    lacks: str | None = None


@dataclass(frozen=True)
class Context:
    """What a reader needs beside a row's values: the columns' names, and the settings."""

    columns: Mapping[str, str]  # slot -> column
    plain: bool  # text is used as it is, not as a turn
    labels: Mapping[str, str] = field(default_factory=dict)  # value -> first | second | tie

    def name(self, slot: str) -> str:
        """The data set's name of the column."""
        return self.columns.get(slot, slot)


Values = dict[str, Any]  # slot -> value
Read = Callable[[Values, Context], list[Example]]


@dataclass(frozen=True)
class Kind:
    """One line of the table. needs, may: slots that must and that may be there. becomes: in words.

    `read` makes the examples of one row and raises BadRow; None: such rows are refused, `becomes`
    is the reason.
    """

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    becomes: str
    read: Read | None
