"""Whether the actor and the reward model can work together."""

from __future__ import annotations

from typing import Any

from rlhf import models
from rlhf.errors import ArtifactError


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
