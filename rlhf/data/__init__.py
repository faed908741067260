"""Preference data: sources, rows as plain text, the split, tokenised rows, batches."""

from rlhf.data.batches import (
    IGNORED,
    PairBatch,
    PromptBatch,
    SFTBatch,
    collate_pairs,
    collate_prompts,
    collate_sft,
    row_lengths,
)
from rlhf.data.plan import Budget, plan_batches, whole_pass
from rlhf.data.prepare import HeldOut, StageData, prepare
from rlhf.data.replay import Replayable
from rlhf.data.texts import texts

__all__ = [
    "IGNORED",
    "Budget",
    "HeldOut",
    "PairBatch",
    "PromptBatch",
    "Replayable",
    "SFTBatch",
    "StageData",
    "collate_pairs",
    "collate_prompts",
    "collate_sft",
    "plan_batches",
    "prepare",
    "row_lengths",
    "texts",
    "whole_pass",
]
