"""The prompts of step 3."""

from __future__ import annotations

from typing import Any, Literal

from rlhf import data
from rlhf.engine import comm
from rlhf.harness import StepRun


def read_prompts(run: StepRun, tokenizer: Any, split: Literal["train", "eval"]) -> data.StageData:
    """This step's prompts to train on, or those that are held out. Collective."""
    settings = run.config.step3.rollout
    assert settings.max_prompt_length is not None  # inherited when it was left unset
    with comm.rank_zero_first():
        rows = data.prepare(
            run.config.data,
            3,
            tokenizer,
            seed=run.config.seed,
            max_prompt_length=settings.max_prompt_length,
            max_length=None,
            split=split,
        )
    for line in rows.lines(split):
        run.say(line)
    return rows
