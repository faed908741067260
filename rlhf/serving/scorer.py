"""A reward model's scores of texts, as step 3 asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf.config.schema import EngineConfig, ModelConfig
from rlhf.data.tokenizers import Encoder
from rlhf.errors import RequirementError
from rlhf.models import choose_dtype, last_tokens, last_values, load_scalar, load_tokenizer
from rlhf.store import MANIFEST, RunDir, verify


class Unreadable(Exception):
    """A text is empty, or has more tokens than the model has positions."""


def find_model(given: str) -> str:
    """An artifact's directory, a run's (its reward model), any Hugging Face directory, or a hub id.

    Raises ArtifactError: an artifact that is damaged or no reward model; RequirementError: a run
    without one.
    """
    place = Path(given).expanduser()
    if (place / "pipeline.json").is_file():
        found = RunDir(place.absolute()).artifact("reward")
        if not found.is_dir():
            raise RequirementError(
                f"{given}: this run has no reward model; make it with --step 2, or name one"
            )
        place = found
    if (place / MANIFEST).is_file():
        verify(place, "reward")
    return str(place) if place.exists() else given


class Scorer:
    """A reward model in one process, on the GPU if there is one."""

    def __init__(self, place: str, *, batch_size: int, normalised: bool) -> None:
        """normalised: (score - mean) / std with the model's own statistics, as in step 3."""
        self._tokenizer = tokenizer = load_tokenizer(place, template=None)
        self._encoder = Encoder(tokenizer, "auto")
        self._model = load_scalar(
            place,
            ModelConfig(),
            engine=EngineConfig(),
            dtype=choose_dtype("auto"),
            pad_token_id=tokenizer.pad_token_id,
            vocab_size=len(tokenizer),
            new_head=False,
        )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(self._device).eval()
        self._batch_size, self._normalised = batch_size, normalised
        self._positions = getattr(self._model.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def scores(
        self, prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        """One per answer: the value at its last token, which is EOS where it `ended`.

        Raises Unreadable.
        """
        rows = self._rows(prompts, answers, ended)
        found: list[float] = []
        for start in range(0, len(rows), self._batch_size):
            ids, mask = self._padded(rows[start : start + self._batch_size])
            raw = last_values(self._model(ids, mask, last_tokens(mask)), mask)
            found += (self._model.normalize(raw) if self._normalised else raw).tolist()
        return found

    def _rows(
        self, prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool]
    ) -> list[list[int]]:
        """Tokens as the steps have them: a prompt's and an answer's by themselves."""
        heads = self._encoder.prompts(prompts, [True] * len(prompts))
        tails = self._encoder.answers(answers)
        rows = [
            head + (tail if end else tail[:-1])
            for head, tail, end in zip(heads, tails, ended, strict=True)
        ]
        for number, row in enumerate(rows):
            if not row:
                raise Unreadable(f"query {number} is empty")
            if self._positions is not None and len(row) > self._positions:
                raise Unreadable(
                    f"query {number} has {len(row)} tokens, the model {self._positions} positions"
                )
        return rows

    def _padded(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._device
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self._tokenizer.pad_token_id, device=device)
        mask = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row, device=device)
            mask[number, : len(row)] = True
        return ids, mask
