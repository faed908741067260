"""Preference data: sources, rows as plain text, the split, tokenised rows, batches.

Batches are tensors: their module is imported at first use, so that the preview needs no torch.
"""

from typing import TYPE_CHECKING, Any

from rlhf.data.decision import Template, choose_template, decide_template
from rlhf.data.plan import Budget, deal, plan_batches, row_order, whole_pass
from rlhf.data.prepare import StageData, prepare
from rlhf.data.replay import Replayable
from rlhf.data.report import HeldOut
from rlhf.data.texts import texts

if TYPE_CHECKING:
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

__all__ = [
    "IGNORED",
    "Budget",
    "HeldOut",
    "PairBatch",
    "PromptBatch",
    "Replayable",
    "SFTBatch",
    "StageData",
    "Template",
    "choose_template",
    "collate_pairs",
    "collate_prompts",
    "collate_sft",
    "deal",
    "decide_template",
    "plan_batches",
    "prepare",
    "row_lengths",
    "row_order",
    "texts",
    "whole_pass",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlhf.data import batches

    return getattr(batches, name)
