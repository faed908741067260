"""The prompts of step 3."""

from __future__ import annotations

from typing import Any, Literal

from rlhf import data, models
from rlhf.engine import comm
from rlhf.harness import StepRun
from step3_ppo.parents import check_tokenizers, reward_model, template_note


def read_tokenizer(run: StepRun) -> Any:
    """The actor's tokenizer, which a reward model must share, with the chat template that this
    step trains with. Collective."""
    sft, reward = run.parent("sft"), reward_model(run)
    tokenizer = models.load_tokenizer(sft, template=None)
    if reward is not None:
        check_tokenizers(sft, reward, tokenizer)
    choose_template(run, tokenizer)
    if reward is not None and (note := template_note(reward, tokenizer)):
        run.say(note)
    return tokenizer


def choose_template(run: StepRun, tokenizer: Any) -> None:
    """Gives the tokenizer the chat template of this run and says which one. Collective."""
    with comm.rank_zero_first():
        template = data.choose_template(tokenizer, run.config.data)
    run.say(f"chat template: {template.sentence}")


def read_prompts(run: StepRun, tokenizer: Any, split: Literal["train", "eval"]) -> data.StageData:
    """This step's prompts to train on, or those that are held out. Collective."""
    settings = run.config.step3.rollout
    assert settings.max_prompt_length is not None  # inherited when it was left unset
    with comm.rank_zero_first():
        rows = data.prepare(
            run.config.data,
            run.stage,
            tokenizer,
            seed=run.config.seed,
            max_prompt_length=settings.max_prompt_length,
            max_length=None,
            split=split,
        )
    for line in rows.lines(split):
        run.say(line)
    return rows
