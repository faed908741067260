"""DeepSpeed's own rollout (HybridEngineRollout over `engine.module.generate`) as a Generation.

It always generates `max_new_tokens`, samples from torch's global random state and knows no stop
strings: here the state is forked and seeded, and answers are cut afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from deepspeed.runtime.rollout import (
    HybridEngineRollout,
    RolloutRequest,
    SamplingConfig,
)
from torch import Tensor, nn
from transformers import GenerationConfig

from rlhf.models.generation import without_text
from rlhf.rollout.base import Rollouts
from rlhf.rollout.generation import (
    Generation,
    base_model,
    causal_lm,
    check_fits,
    evaluating,
    prompt_lengths,
)


class HybridRollout(Rollouts):
    """Adapter; `log_probs` is None, the trainer computes them.

    `engine` is a DeepSpeedEngine, a DeepSpeedHybridEngine (GPU) or anything with `.module` that
    has `.generate`. Arguments as in Rollouts; `lockstep` needs nothing, since every rank
    always takes `max_new_tokens` steps: give all ranks equally many prompts. Ranks sample apart:
    another number of them gives other answers.
    """

    name = "hybrid"

    def __init__(self, engine: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(engine, tokenizer, **options)
        self._rollout = HybridEngineRollout(engine, tokenizer)

    @torch.no_grad()
    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> Generation:
        """Answer every prompt; errors as in ContinuousRollout.generate."""
        module, samples = self.engine.module, sampling.n_samples_per_prompt
        model = causal_lm(module)
        check_fits(model, int(prompt_lengths(request).max()), sampling.max_new_tokens)
        width, limit = request.prompt_ids.shape[1], sampling.max_new_tokens
        plain = replace(sampling, continuous_batch_size=None)
        prompts = max(1, self.batch_size // samples)
        parts = []
        with (
            self.gather(),
            _evaluating(self.engine),
            _plain_generation(model, self.vocab_size),
            self._random(),
        ):
            for ids, mask in zip(
                request.prompt_ids.split(prompts),
                request.prompt_attention_mask.split(prompts),
                strict=True,
            ):
                batch = self._rollout.generate(RolloutRequest(ids, mask), plain)
                part = batch.input_ids[:, width:]
                missing = limit - part.shape[1]
                parts.append(nn.functional.pad(part, (0, missing), value=self.pad))
        answers = torch.cat(parts)
        lengths, ended = self._ends(answers)
        return self.finished(request, samples, answers, lengths, ended)

    @contextmanager
    def _random(self) -> Iterator[None]:
        """torch's random state seeded from our generator and the rank inside, unchanged after."""
        seed = int(torch.randint(2**62, (), generator=self.generator)) + 100003 * self.rank
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    def _ends(self, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths (B,) and ended (B,) from the first EOS or stop string in answers (B, A)."""
        is_eos = self.ends(answers)
        ended = is_eos.any(dim=1)
        limit = torch.full_like(answers[:, 0], answers.shape[1])
        lengths = torch.where(ended, is_eos.long().argmax(dim=1) + 1, limit)
        if self.stop:
            stops = self.stop.first_ends(answers, lengths)
            lengths = torch.where(stops > 0, stops, lengths)
            ended = ended | (stops > 0)
        return lengths, ended


@contextmanager
def _evaluating(engine: Any) -> Iterator[None]:
    """`evaluating`, through the engine's own switch where it has one: DeepSpeedHybridEngine
    swaps its inference kernels in and out there."""
    with evaluating(engine.module):
        switch = isinstance(engine, nn.Module) and engine.training
        if switch:
            engine.eval()
        try:
            yield
        finally:
            if switch:
                engine.train()


@contextmanager
def _plain_generation(model: Any, vocab_size: int | None) -> Iterator[None]:
    """Hide the model's generation defaults (repetition penalty, sampling filters): the policy that
    is scored must be the one that samples (ALGORITHM.md 14), from the tokenizer's ids alone."""
    base = base_model(model)
    before = base.generation_config
    base.generation_config = GenerationConfig(suppress_tokens=without_text(base, vocab_size))
    try:
        yield
    finally:
        base.generation_config = before
