"""Settings that say what the rows of a data set are, where their columns do not."""

from __future__ import annotations

from typing import Literal

from rlhf.config.base import Section, doc


class RowsConfig(Section):
    format: Literal[
        "auto",
        "comparisons",
        "ranked",
        "labelled_pairs",
        "scored_pairs",
        "pairs",
        "conversation",
        "alpaca",
        "prompt_completion",
        "prompts",
    ] = doc("auto", "The shape of the rows; auto: found from their columns (docs/data.md).")
    ignore_columns: list[str] = doc(
        [], "Columns that are left out knowingly, though they may change what a row means."
    )
    keep_columns: list[str] = doc(
        [], "Columns that reward functions and judges are given, by their names in the data."
    )
    labels: dict[str, Literal["first", "second", "tie"]] = doc(
        {}, "For pairs with a label: what its values say, e.g. `data.labels.0=first`."
    )
    prompt_in_answers: Literal["auto", "strip", "keep"] = doc(
        "auto",
        "Answers that begin with the whole prompt: auto takes it off where all do and refuses a "
        "mixture; strip takes it off wherever it is; keep trains on it.",
    )
    plain_prompts: Literal["as_is", "turns"] = doc(
        "as_is",
        "Prompts that are text: trained as they are, or made turns (by their Human/Assistant "
        "marks, else one user turn) and written by the chat template.",
    )
    multi_turn: Literal["last", "all"] = doc(
        "last",
        "Which assistant turns of a conversation step 1 learns. Steps 2 and 3: always the last.",
    )
    long_prompts: Literal["truncate", "drop"] = doc(
        "truncate",
        "A prompt over the limit: its oldest turns go (of text that is no dialogue: the left end), "
        "or the row is dropped.",
    )
