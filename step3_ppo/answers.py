"""Models answer held-out prompts, and their answers are scored: the same prompts for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from rlhf import data
from rlhf.config.rewards import is_model_alone
from rlhf.config.schema import RLConfig
from rlhf.engine import comm
from rlhf.evaluation.answers import AnswerRecord
from rlhf.rollout import build_rollout, gathering
from rlhf.text import normalised
from step3_ppo.cast import Cast
from step3_ppo.experience import answer_scores, generate, policy_log_probs
from step3_ppo.rewarder import Rewarder, Texts
from step3_ppo.rollout import answer_ids

T = TypeVar("T")


def prompt_indices(prompts: Sequence[str], wanted: int) -> list[int]:
    """Which of the held-out prompts are answered, `wanted` in all; none where there are none.

    Each different prompt (normalised) once, in the order of the rows; where they are fewer than
    `wanted`, the same ones again, for further answers.
    """
    firsts: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        firsts.setdefault(normalised(prompt), index)
    different = list(firsts.values())
    return [different[number % len(different)] for number in range(wanted if different else 0)]


def share_of(indices: Sequence[int], rank: int, world: int) -> list[int]:
    """A rank's part: every `world`-th. As many on each rank: the first one is repeated as needed,
    and `in_order` drops what is over."""
    padded = [*indices, *[indices[0]] * (-len(indices) % world)]
    return padded[rank::world]


def in_order(gathered: Sequence[T], count: int, world: int) -> list[T]:
    """All ranks' parts, joined in rank order, as the `count` items that `share_of` shared out."""
    each = len(gathered) // world
    return [gathered[(number % world) * each + number // world] for number in range(count)]


@dataclass(frozen=True)
class Questions:
    """The prompts that are answered, over all ranks, and how."""

    rows: Sequence[dict[str, Any]]
    settings: RLConfig
    tokenizer: Any
    seed: int

    def answers(self, cast: Cast) -> dict[str, list[AnswerRecord]]:
        """Every model's, not yet judged, in the order of `rows`, on every rank. Collective."""
        found: dict[str, list[AnswerRecord]] = {}
        for name, speaker in cast.speakers.items():
            with speaker() as engine:
                if engine is not None:
                    found[name] = self._answers_of(engine, cast)
                del engine
        return found

    def _answers_of(self, engine: Any, cast: Cast) -> list[AnswerRecord]:
        world, pad = comm.world_size(), self.tokenizer.pad_token_id
        mine = share_of(range(len(self.rows)), comm.rank(), world)
        prompts = data.collate_prompts([self.rows[index] for index in mine], pad)
        records = self._scored(engine, cast, prompts.to(cast.reference.device))
        return in_order(comm.gather_lists(records), len(self.rows), world)

    def _scored(self, engine: Any, cast: Cast, prompts: data.PromptBatch) -> list[AnswerRecord]:
        """One sampled answer of `engine`'s model to each of this rank's prompts."""
        rollout_settings = self.settings.rollout.model_copy(update={"samples_per_prompt": 1})
        # One vLLM a process: it holds the policy's weights, and other models answer here too.
        name = "continuous" if rollout_settings.engine == "vllm" else rollout_settings.engine
        sampler = build_rollout(
            name,
            engine,
            self.tokenizer,
            batch_size=rollout_settings.batch_size,
            stop=rollout_settings.stop,
            seed=self.seed,
            rank=comm.rank(),
            world=comm.world_size(),
            **gathering(rollout_settings.gather, name, engine.module).options,
        )
        size = data.Budget(self.settings.micro_batch_size, self.settings.micro_batch_tokens)
        temperature = rollout_settings.temperature
        with torch.no_grad():
            rollout = generate(sampler, prompts, rollout_settings)
            raw = None
            if cast.reward is not None:
                raw = rollout.map(lambda r: answer_scores(cast.reward, r), size)
            mine = rollout.map(lambda r: policy_log_probs(engine, r, temperature), size)
            reference = rollout.map(
                lambda r: policy_log_probs(cast.reference, r, temperature), size
            )
        texts = Texts.of(rollout, prompts, self.tokenizer)
        rewarder = Rewarder(self.settings, self.tokenizer, cast.statistics)
        terms = rewarder.terms(raw, texts, rollout.ended.device)
        scores = rewarder.total(terms).tolist()
        kl = ((mine - reference) * rollout.answer_mask).sum(dim=1).tolist()
        ids, ended = answer_ids(rollout), rollout.ended.tolist()
        shown = {} if is_model_alone(self.settings.rewards) else terms
        return [
            AnswerRecord(
                prompt=texts.prompts[row],
                answer=texts.answers[row],
                ids=ids[row],
                ended=ended[row],
                score=scores[row],
                kl=kl[row],
                judge=None,
                rewards={name: float(values[row]) for name, values in shown.items()},
                columns={name: values[row] for name, values in prompts.columns.items()},
            )
            for row in range(len(rollout))
        ]
