"""The reward model's opinion of an answer, as PPO asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.chat.speaker import Answer, Speaker
from rlhf.config.schema import EngineConfig, ModelConfig
from rlhf.config.training import LoraConfig
from rlhf.errors import ArtifactError, RequirementError
from rlhf.models import choose_dtype, fingerprint, last_values, load_scalar, load_tokenizer
from rlhf.store import MANIFEST, verify


@dataclass(frozen=True)
class Opinion:
    """The value at the answer's last token, and on the scale of held-out chosen answers (0: their
    mean, 1: their standard deviation), which only our own reward models have."""

    raw: float
    normalised: float | None

    def line(self) -> str:
        if self.normalised is None:
            return f"{self.raw:.3f} raw (the model has no scale of its own to normalise with)"
        return f"{self.normalised:.3f} normalised, {self.raw:.3f} raw"


class Scorer:
    """A reward model, loaded when it is first asked."""

    def __init__(self, place: str, trusted: bool) -> None:
        self.place, self._trusted = place, trusted
        self._model: Any = None
        self._reads = ""

    def score(self, speaker: Speaker, answer: Answer) -> Opinion:
        """Raises RequirementError, ArtifactError: there is no such model, it does not verify, or it
        reads other tokens than the speaker's."""
        self._load()
        if fingerprint(speaker.tokenizer) != self._reads:
            raise RequirementError(
                f"the reward model {self.place} reads other tokens than {speaker.name} writes: "
                "give one with the same tokenizer (--reward-model)"
            )
        device = self._model.model.device
        ids = torch.tensor([answer.prompt_ids + answer.ids], device=device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.inference_mode():
            raw = last_values(self._model(ids, mask), mask)
            normalised = float(self._model.normalize(raw))
        return Opinion(float(raw), normalised if self._has_scale() else None)

    def _has_scale(self) -> bool:
        return hasattr(self._model.config, "rlhf_score_mean")

    def _load(self) -> None:
        if self._model is not None:
            return
        if not self.place:
            raise RequirementError(
                "no reward model is known for this model: start with --reward-model MODEL"
            )
        path = Path(self.place)
        if (path / MANIFEST).is_file():
            verify(path, "reward")
        elif path.is_absolute() and not path.is_dir():
            raise ArtifactError(f"the reward model {self.place} is not there any more")
        tokenizer = load_tokenizer(self.place, template=None, trust_remote_code=self._trusted)
        model = load_scalar(
            self.place,
            ModelConfig(trust_remote_code=self._trusted, lora=LoraConfig()),
            engine=EngineConfig(),
            dtype=choose_dtype("auto"),
            pad_token_id=tokenizer.pad_token_id,
            vocab_size=len(tokenizer),
            new_head=False,
        )
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._reads, self._model = fingerprint(tokenizer), model
