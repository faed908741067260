"""The evidence: base, SFT and trained model answer the same held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlhf import data
from rlhf.config.schema import RLConfig
from rlhf.data.judges import Judge
from rlhf.engine import comm
from rlhf.evaluation.answers import AnswerRecord
from rlhf.rollout import build_rollout, gathering
from step3_ppo.experience import answer_scores, generate, policy_log_probs
from step3_ppo.roles import Roles
from step3_ppo.rollout import Rollout


def answer_ids(rollout: Rollout) -> list[list[int]]:
    """The answers' tokens as they are judged: a stop string is not among them (16)."""
    answers, masks = (x[:, rollout.prompt_width :] for x in rollout.read)
    return [row[mask].tolist() for row, mask in zip(answers, masks, strict=True)]


@dataclass(frozen=True)
class Evaluation:
    """Held-out prompts of this rank, and how answers to them are scored."""

    prompts: data.PromptBatch
    settings: RLConfig
    roles: Roles
    tokenizer: Any
    judge: Judge | None
    seed: int

    def answers_of(self, engine: Any) -> list[AnswerRecord]:
        """One sampled answer of `engine`'s model to each prompt, scored; over all ranks."""
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
            **gathering(rollout_settings.gather, name, engine.module).options,
        )
        size = data.Budget(self.settings.micro_batch_size, self.settings.micro_batch_tokens)
        temperature = rollout_settings.temperature
        with torch.no_grad():
            rollout = generate(sampler, self.prompts, rollout_settings)
            raw = rollout.map(lambda r: answer_scores(self.roles.reward, r), size)
            mine = rollout.map(lambda r: policy_log_probs(engine, r, temperature), size)
            reference = rollout.map(
                lambda r: policy_log_probs(self.roles.reference, r, temperature), size
            )
        scores = self.roles.reward.module.normalize(raw).tolist()
        kl = ((mine - reference) * rollout.answer_mask).sum(dim=1).tolist()
        ids, ended = answer_ids(rollout), rollout.ended.tolist()
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        judged: list[float | None] = [None] * len(texts)
        if self.judge is not None:
            judged = list(self.judge.score(self.prompts.prompts, texts, ended))
        records = [
            AnswerRecord(
                prompt=prompt, answer=text, ids=row, ended=end, score=value, kl=nats, judge=points
            )
            for prompt, text, row, end, value, nats, points in zip(
                self.prompts.prompts, texts, ids, ended, scores, kl, judged, strict=True
            )
        ]
        return comm.gather_lists(records)
