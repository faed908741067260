"""The reward model, and whether the actor and it can work together."""

from __future__ import annotations

from typing import Any

from rlhf import models
from rlhf.errors import ArtifactError
from rlhf.harness import StepRun


def reward_model(run: StepRun) -> str | None:
    """Where the reward model is; None: no term of the reward is a model."""
    return run.parent("reward") if run.config.step3.uses_reward_model else None


def check_tokenizers(sft: str, reward: str, tokenizer: Any) -> None:
    """Raises ArtifactError unless both models read text as the same tokens."""
    actors = models.fingerprint(tokenizer)
    rewards = models.fingerprint(models.load_tokenizer(reward, template=None))
    if actors != rewards:
        raise ArtifactError(
            f"step 3: the reward model {reward} was trained with tokenizer {rewards[:12]}, the "
            f"actor's ({sft}) is {actors[:12]}: retrain step 2 on this actor's tokenizer "
            "(`python train.py --step 2`), or pass a --reward-model that shares it."
        )


def template_note(reward: str, tokenizer: Any) -> str:
    """A warning where the reward model was trained with another chat template, else empty.

    tokenizer: the actor's, with the template that its artifact will carry.
    """
    if models.load_tokenizer(reward, template=None).chat_template == tokenizer.chat_template:
        return ""
    return (
        f"warning: the reward model {reward} carries another chat template than this step trains "
        "with: it scores text of a form that it may not have seen. Train step 2 on the same data "
        "and template, or set data.template to the one of both"
    )
