"""What answers are rewarded by: the weighted sum of step3.rewards (docs/rewards.md)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.config.rewards import MODEL, RewardTerm, is_model_alone
from rlhf.config.schema import RLConfig
from rlhf.data.batches import PromptBatch
from rlhf.engine import comm
from rlhf.rewards import ENDED, Asked, asked, resolve_reward
from step3_ppo.rollout import Rollout, answer_ids


@dataclass(frozen=True)
class Texts:
    """N answers as text, each with its prompt and its row's columns (`ended`, and those that
    data.keep_columns names)."""

    prompts: list[str]
    answers: list[str]
    columns: dict[str, list[Any]]

    @classmethod
    def of(cls, rollout: Rollout, prompts: PromptBatch, tokenizer: Any) -> Texts:
        """The answers as they are judged: without special tokens, and without a stop string."""
        samples = len(rollout) // max(len(prompts.prompts), 1)
        kept = {
            n: [v for v in column for _ in range(samples)] for n, column in prompts.columns.items()
        }
        return cls(
            prompts=[prompt for prompt in prompts.prompts for _ in range(samples)],
            answers=[
                tokenizer.decode(ids, skip_special_tokens=True) for ids in answer_ids(rollout)
            ],
            columns={ENDED: rollout.ended.tolist(), **kept},
        )


class Rewarder:
    """Gives each answer its reward. Read `__call__`."""

    def __init__(
        self, settings: RLConfig, tokenizer: Any, statistics: tuple[float, float] | None
    ) -> None:
        """statistics: mean and deviation of the reward model's scores; None: there is none.

        Raises ConfigError for a function that does not exist.
        """
        self._terms = settings.rewards
        self._alone = is_model_alone(settings.rewards)
        self._tokenizer = tokenizer
        normalised = self._alone or settings.ppo.normalize_score
        self._model_scale = statistics if statistics and normalised else (0.0, 1.0)
        self._clip = settings.ppo.score_clip
        self._functions = {
            term.name: resolve_reward(term) for term in settings.rewards if term.use != MODEL
        }
        self.seconds: dict[str, float] = {}
        # Of a reward model alone `scores` stay raw, on this scale; else they are the reward itself.
        self.statistics = statistics if self._alone else None

    def __call__(self, rollout: Rollout, prompts: PromptBatch) -> tuple[Rollout, dict[str, float]]:
        """2. The rollout with the sum of all terms as its scores, and each term's figures over all
        ranks. Collective.

        The reward model's term is normalised and clipped as without other terms; functions count
        as they are.
        """
        if self._alone:
            return rollout, {}
        texts = Texts.of(rollout, prompts, self._tokenizer)
        terms = self.terms(rollout.scores, texts, rollout.ended.device, self._clip)
        return replace(rollout, scores=self.total(terms)), self._figures(terms)

    def terms(
        self,
        raw: Tensor | None,
        texts: Texts,
        device: torch.device,
        clip: float | None = None,
    ) -> dict[str, Tensor]:
        """Name -> (N,) fp32, before its weight. `raw`: the reward model's scores, if it has any.

        Raises RewardFailed: a function raised an error, took too long, or gave no numbers.
        """
        found = {}
        for term in self._terms:
            if term.use != MODEL:
                found[term.name] = torch.tensor(self._asked(term, texts), device=device)
                continue
            assert raw is not None
            mean, std = self._model_scale
            value = (raw.float() - mean) / std
            found[term.name] = value if clip is None else value.clamp(-clip, clip)
        return found

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """(N,) fp32: the weighted sum."""
        weighted = [terms[term.name] * term.weight for term in self._terms]
        return torch.stack(weighted).sum(0)

    def _asked(self, term: RewardTerm, texts: Texts) -> list[float]:
        began = time.perf_counter()
        how = Asked("reward", term.timeout, "timeout of the term in step3.rewards")
        function = self._functions[term.name]
        points = asked(function, texts.prompts, texts.answers, texts.columns, how)
        self.seconds[term.name] = time.perf_counter() - began
        return points

    def _figures(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean and deviation of each term over all ranks' answers; seconds of this rank."""
        parts: dict[str, float] = {}
        for name, values in terms.items():
            parts |= {
                f"{name}": float(values.double().sum()),
                f"{name} squared": float((values.double() ** 2).sum()),
            }
        parts[" answers"] = float(
            len(next(iter(terms.values())))
        )  # no term has a space in its name
        sums = comm.sum_over_ranks(parts)
        found: dict[str, float] = {}
        for name in terms:
            mean = sums[name] / sums[" answers"]
            variance = max(sums[f"{name} squared"] / sums[" answers"] - mean**2, 0.0)
            found |= {f"term_{name}": mean, f"term_{name}_std": variance**0.5}
        return found | {f"seconds_term_{name}": value for name, value in self.seconds.items()}
