"""A reward model trained through step 2's own loss and engine on Bradley-Terry labels (45)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf.certify.check import Check
from rlhf.certify.engine import scalar_model
from rlhf.certify.problem import PAD, Problem, make_problem
from rlhf.config.schema import EngineConfig, OptimConfig
from rlhf.data.batches import collate_pairs
from rlhf.engine.train import TrainEngine
from rlhf.evaluation.reward_metrics import pair_metrics
from rlhf.models import last_tokens, last_values
from step2_reward.main import reward_step

PAIRS, HELD_OUT = 256, 20_000


def bradley_terry(seed: int, steps: int, zero_stage: int = 0) -> Iterator[Check]:
    """Labels drawn with probability sigmoid(r1 - r2): nobody can do better than the ceiling
    E[sigmoid(|r1 - r2|)], which is enumerated; so is the model's own accuracy."""
    problem = make_problem(seed + 100, prompts=1)
    generator = torch.Generator().manual_seed(seed)
    engine = TrainEngine(
        scalar_model(0.14),
        EngineConfig.model_validate({"zero_stage": zero_stage}),
        OptimConfig(learning_rate=3e-3, scheduler="linear"),
        dtype="float32",
        total_steps=steps,
    )
    for _ in range(steps):
        rows = [_row(problem, *pair) for pair in _draw(problem, PAIRS, generator)]
        reward_step(engine, [collate_pairs(rows, PAD).to(engine.device)], "last", 0.0)
    scores = _scores(engine, problem)
    truth = problem.raw[:, :, None] - problem.raw[:, None, :]
    model = scores[:, :, None] - scores[:, None, :]
    different = ~torch.eye(len(problem.answers), dtype=torch.bool).expand_as(truth)
    right = torch.where(model > 0, truth.sigmoid(), (-truth).sigmoid())[different].mean()
    ceiling = truth.abs().sigmoid()[different].mean()
    name = f"reward model: accuracy {float(right):.4f} below the ceiling {float(ceiling):.4f}"
    yield Check(name, float(ceiling - right), 0.015)
    drawn = _draw(problem, HELD_OUT, generator)
    chosen = [float(scores[p, c]) for p, c, _ in drawn]
    rejected = [float(scores[p, r]) for p, _, r in drawn]
    alike = [1] * len(drawn)
    metrics = pair_metrics(chosen, rejected, alike, alike, [prompt for prompt, *_ in drawn])
    yield Check("reward model: calibration error", metrics["calibration_error"], 0.03)


def _draw(problem: Problem, count: int, generator: torch.Generator) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) by number; the label is a draw."""
    answers = len(problem.answers)
    prompt = torch.randint(len(problem.prompts), (count,), generator=generator)
    first = torch.randint(answers, (count,), generator=generator)
    second = (first + torch.randint(1, answers, (count,), generator=generator)) % answers
    margin = problem.raw[prompt, first] - problem.raw[prompt, second]
    wins = torch.rand(count, generator=generator).double() < margin.sigmoid()
    chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
    return list(zip(prompt.tolist(), chosen.tolist(), rejected.tolist(), strict=True))


def _row(problem: Problem, prompt: int, chosen: int, rejected: int) -> dict[str, object]:
    return {
        "prompt_ids": problem.prompts[prompt],
        "chosen_ids": list(problem.answers[chosen]),
        "rejected_ids": list(problem.answers[rejected]),
        "margin": 0.0,
    }


def _scores(engine: TrainEngine, problem: Problem) -> Tensor:
    """(P, K) float64, each answer as the chosen side of a pair with itself."""
    count = len(problem.answers)
    rows = [_row(problem, p, k, k) for p in range(len(problem.prompts)) for k in range(count)]
    batch = collate_pairs(rows, PAD).to(engine.device)
    with engine.evaluating():
        values = engine(batch.input_ids, batch.attention_mask, last_tokens(batch.attention_mask))
    found = last_values(values, batch.attention_mask)[: len(rows)]
    return found.view(-1, count).double().cpu()
