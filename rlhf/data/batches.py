"""Rows to tensors. Masks are bool, True = counts; ids are int64.

An empty list of rows (a rank with nothing to do in this micro-batch) gives one dummy row that runs
through a model and counts for nothing, so that every rank takes part in the collectives.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from rlhf.data.encode import KEPT
from rlhf.data.plan import plan_batches

__all__ = [
    "PairBatch",
    "PromptBatch",
    "SFTBatch",
    "collate_pairs",
    "collate_prompts",
    "collate_sft",
    "plan_batches",
    "row_lengths",
]

IGNORED = -100
Rows = Sequence[dict[str, Any]]
_Self = TypeVar("_Self", bound="_Batch")


class _Batch:
    def to(self: _Self, device: torch.device | str) -> _Self:
        """The same batch with its tensors on another device."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
        return type(self)(**moved)


@dataclass(frozen=True)
class SFTBatch(_Batch):
    """B rows of prompt + answer, padded on the right to T.

    input_ids (B, T) int64. attention_mask (B, T) bool. labels (B, T) int64: the ids, not shifted;
    -100 on pads and, unless prompt loss is on, on the prompt. EOS is a counted label.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PairBatch(_Batch):
    """B pairs for one forward of 2B rows: the B chosen, then the B rejected, padded right to T.

    input_ids (2B, T) int64. attention_mask (2B, T) bool. answer_mask (2B, T) bool: the answers'
    tokens, EOS included. last (2B,) int64: place of the last real token. margin (B,) float32.
    pair_mask (B,) bool: False on a dummy pair.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    last: Tensor
    margin: Tensor
    pair_mask: Tensor


@dataclass(frozen=True)
class PromptBatch(_Batch):
    """B prompts, padded on the left to P.

    input_ids (B, P) int64. attention_mask (B, P) bool. prompts: their texts. columns: name -> B
    values of the data's own, those of data.keep_columns. B may be 0.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompts: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)


def collate_sft(rows: Rows, pad_id: int, *, prompt_loss: bool = False) -> SFTBatch:
    """Rows of step 1 (prompt_ids, answer_ids, and `unlearned`: starts and ends, in turn, of what is
    not learned among the answer's ids) to a batch."""
    if not rows:
        ids = torch.full((1, 2), pad_id)
        return SFTBatch(ids, torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), IGNORED))
    input_ids, mask = _pad([row["prompt_ids"] + row["answer_ids"] for row in rows], pad_id)
    counted = mask if prompt_loss else _answers(mask, [len(row["prompt_ids"]) for row in rows])
    if not prompt_loss:
        for number, row in enumerate(rows):
            spans = torch.tensor(row.get("unlearned") or [], dtype=torch.int64)
            for start, end in (spans.view(-1, 2) + len(row["prompt_ids"])).tolist():
                counted[number, start:end] = False
    return SFTBatch(input_ids, mask, input_ids.masked_fill(~counted, IGNORED))


def collate_pairs(rows: Rows, pad_id: int) -> PairBatch:
    """Rows of step 2 (prompt_ids, chosen_ids, rejected_ids, margin) to a batch."""
    pairs = rows or [
        {"prompt_ids": [pad_id], "chosen_ids": [pad_id], "rejected_ids": [pad_id], "margin": 0.0}
    ]
    sides = [row["prompt_ids"] + row[s] for s in ("chosen_ids", "rejected_ids") for row in pairs]
    input_ids, mask = _pad(sides, pad_id)
    starts = [len(row["prompt_ids"]) for row in pairs] * 2
    return PairBatch(
        input_ids=input_ids,
        attention_mask=mask,
        answer_mask=_answers(mask, starts),
        last=mask.sum(dim=1) - 1,
        margin=torch.tensor([row["margin"] for row in pairs], dtype=torch.float32),
        pair_mask=torch.full((len(pairs),), bool(rows)),
    )


def collate_prompts(rows: Rows, pad_id: int) -> PromptBatch:
    """Rows of step 3 (prompt_ids, prompt, and `columns`: JSON, if any are kept) to a batch."""
    input_ids, mask = _pad([row["prompt_ids"] for row in rows], pad_id, left=True)
    kept = [json.loads(row[KEPT]) for row in rows if KEPT in row]
    columns = {name: [values[name] for values in kept] for name in (kept[0] if kept else ())}
    return PromptBatch(input_ids, mask, [row["prompt"] for row in rows], columns)


def row_lengths(dataset: datasets.Dataset) -> list[int]:
    """Tokens of each row as a batch holds it: prompt plus the longest of its answers."""
    table = dataset.with_format("arrow")[:]
    size = {
        name: pc.list_value_length(table[name]).to_numpy()
        for name in table.column_names
        if name.endswith("_ids")
    }
    total = size.pop("prompt_ids")
    if size:
        total = total + np.maximum.reduce(list(size.values()))
    return [int(length) for length in total]


def _pad(rows: Sequence[list[int]], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = True
    return ids, mask


def _answers(mask: Tensor, starts: Sequence[int]) -> Tensor:
    return mask & (torch.arange(mask.shape[1]) >= torch.tensor(starts).unsqueeze(1))
