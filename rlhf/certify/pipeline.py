"""Checks of step 3's parts and of what its loop reaches (through certify/engine.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.kl import FixedKL
from rlhf.certify.check import Check
from rlhf.certify.engine import GROUP, LETTERS, all_answers, answer_log_probs, settings, trainer
from rlhf.certify.problem import EOS, Problem, divergence, group_fixed_point, make_problem
from rlhf.data.batches import collate_prompts
from step3_ppo.experience import answer_scores, answer_values, generate, reward, score
from step3_ppo.main import Trainer
from step3_ppo.rollout import Rollout, answer_ids
from step3_ppo.update import update

TEMPERATURE = 0.8
STOP = 7  # the letter f


@dataclass(frozen=True)
class Case:
    """A run of step 3's loop, and what it must reach."""

    algorithm: str
    ppo: dict[str, Any]
    ends: str = "optimum"

    @property
    def name(self) -> str:
        given = "".join(f", {key}={value}" for key, value in self.ppo.items())
        return f"through the engine: {self.algorithm}{given}"


CASES = (
    Case("ppo", {}),
    Case("rloo", {"minibatches": 2, "epochs": 1}),
    Case("reinforce++", {}),
    Case("grpo", {}, "fixed"),
    Case("grpo", {"kl_in": "reward"}),
)


def converges(case: Case, seed: int, iterations: int, zero_stage: int = 0) -> Iterator[Check]:
    """Trains from the reference; nats from the optimum, or from GRPO's own fixed point."""
    problem = make_problem(seed)
    config = settings(
        case.algorithm, seed, problem, ppo=case.ppo, rollout={"temperature": TEMPERATURE}
    )
    made = trainer(problem, config, iterations, zero_stage)
    reference = answer_log_probs(made.roles.reference, problem, TEMPERATURE)
    end = problem.optimum(reference)
    if case.ends == "fixed":
        end = group_fixed_point(problem, reference, GROUP, "k2")
    error = 0.0
    for stats in made.iterate():
        error = max(error, stats["first_ratio_error"], abs(stats["first_approx_kl"]))
        if not error <= 1e-3:
            break  # what samples is not what is updated: the rest would tell nothing new
    yield Check(f"{case.name}: ratio is 1 before each update", error, 1e-3)
    with made.roles.actor.evaluating():
        policy = answer_log_probs(made.roles.actor, problem, TEMPERATURE)
    yield Check(f"{case.name}: KL to its end", divergence(policy, end), 0.01, "nats")
    if made.roles.critic is not None:
        yield _critic(made, problem, policy.double(), reference.double())


def _critic(made: Trainer, problem: Problem, policy: Tensor, reference: Tensor) -> Check:
    """The value before the first token is the expected score less the KL to come."""
    expected = (policy.exp() * (problem.rewards - problem.beta * (policy - reference))).sum(1)
    critic = made.roles.critic
    assert critic is not None
    with critic.evaluating():
        values = answer_values(critic, all_answers(problem, critic.device))[:, 0]
    apart = (values.view(len(expected), -1)[:, 0].cpu() - expected).abs().max()
    return Check("through the engine: ppo's value of a prompt", float(apart), 0.1)


def parts(seed: int, zero_stage: int = 0) -> Iterator[Check]:
    """Rollout, scoring and update against enumerated numbers, before any training."""
    problem = make_problem(seed)
    given = {"temperature": TEMPERATURE, "prompts": 512}
    config = settings("ppo", seed, problem, rollout=given)
    made = trainer(problem, config, 10, zero_stage)
    exact = answer_log_probs(made.roles.reference, problem, TEMPERATURE)
    rest = float((exact.exp().sum(1) - 1).abs().max())
    yield Check("probabilities of all answers: |sum - 1|", rest, 1e-4)
    rollout = _sampled(made, problem)
    places = _places(problem, rollout)
    assert rollout.log_probs is not None
    noted = rollout.log_probs.sum(1).cpu()
    expected = exact.flatten()[places]
    yield Check("log-probs that the rollout notes", float((noted - expected).abs().max()), 1e-3)
    yield Check("frequencies of what is sampled: chi-square's z", _z(places, exact), 5.0)
    scored = score(made.roles, rollout, TEMPERATURE, 256)
    scores = scored.need("scores").cpu().double()
    yield Check("scores", float((scores - problem.raw.flatten()[places]).abs().max()), 1e-4)
    ppo = config.step3.ppo
    coef = FixedKL(problem.beta)
    rewarded, _ = reward(scored, ppo, coef, made.statistics, kl_in_reward=True)
    whole = rewarded.need("token_rewards").sum(1).cpu().double()
    apart = (whole - problem.rewards.flatten()[places]).abs().max()  # policy = reference: KL 0
    yield Check("rewards of answers", float(apart), 1e-3)
    yield Check("ended", float((rollout.ended.cpu() != problem.ended.repeat(2)[places]).sum()), 0.0)
    yield _values(made, rollout)
    yield _micro_batches(made, scored, problem, zero_stage)
    yield from stop_strings(seed, zero_stage)


def _sampled(made: Trainer, problem: Problem) -> Rollout:
    rows = [{"prompt_ids": ids, "prompt": LETTERS[ids[0]]} for ids in problem.prompts] * 256
    prompts = collate_prompts(rows, 0).to(made.roles.actor.device)
    with made.roles.actor.evaluating():
        return generate(made.sampler, prompts, made.run.config.step3.rollout)


def _places(problem: Problem, rollout: Rollout) -> Tensor:
    """(N,) int64: each row's place among all answers to all prompts; what it says as read."""
    number = {answer: place for place, answer in enumerate(problem.answers)}
    places = []
    for row, ids in enumerate(answer_ids(rollout)):
        prompt = (row // GROUP) % len(problem.prompts)
        places.append(prompt * len(number) + number.get(tuple(ids), 0))
    return torch.tensor(places)


def _z(places: Tensor, exact: Tensor) -> float:
    """Standard deviations of Pearson's chi-square above what draws from `exact` give."""
    p = exact.double().exp().flatten()
    counts = torch.bincount(places, minlength=len(p)).double()
    wanted = p * len(places) / len(exact)
    common = wanted >= 5
    freedom = int(common.sum()) - len(exact)
    found = ((counts - wanted).square() / wanted)[common].sum()
    return float((found - freedom) / (2 * freedom) ** 0.5)


def _values(made: Trainer, rollout: Rollout) -> Check:
    """The value before each token, against a forward over what comes before it alone (25)."""
    critic = made.roles.critic
    assert critic is not None
    worst = 0.0
    with critic.evaluating():
        values = answer_values(critic, rollout.rows(torch.arange(16)))
        for row in range(16):
            ids = rollout.input_ids[row][rollout.attention_mask[row]]
            length = int(rollout.answer_mask[row].sum())
            for token in range(length):
                before = ids[None, : len(ids) - length + token]
                alone = critic(before, torch.ones_like(before).bool())[0, -1]
                worst = max(worst, float((values[row, token] - alone).abs()))
    return Check("values before each token", worst, 1e-3)


def _micro_batches(made: Trainer, scored: Rollout, problem: Problem, zero_stage: int) -> Check:
    """One optimiser step in one micro-batch, and in micro-batches of 7 rows (30)."""
    rows = scored.rows(torch.arange(40))
    generator = torch.Generator().manual_seed(2)
    advantages = torch.randn(rows.answer_mask.shape, generator=generator)
    rows = replace(rows, advantages=advantages.to(rows.input_ids.device) * rows.answer_mask)
    found = []
    for size in (40, 7):
        again = trainer(problem, made.run.config, 10, zero_stage)
        ppo = made.run.config.step3.ppo.model_copy(update={"epochs": 1})
        options: dict[str, Any] = {"temperature": TEMPERATURE, "micro_batch_size": size, "seed": 1}
        update(again.roles.actor, None, rows, ppo, **options)
        found.append(answer_log_probs(again.roles.actor, problem, TEMPERATURE))
    apart = float((found[0] - found[1]).abs().max())
    moved = float(
        (found[0] - answer_log_probs(made.roles.reference, problem, TEMPERATURE)).abs().max()
    )
    return Check("one step in micro-batches of 40 and 7 rows, of the change", apart / moved, 1e-2)


def stop_strings(seed: int, zero_stage: int = 0) -> Iterator[Check]:
    """A stop string ends an answer, and the reward model reads EOS in its place (16)."""
    problem = make_problem(seed)
    given = {"stop": [LETTERS[STOP]], "prompts": 512}
    config = settings("rloo", seed, problem, rollout=given)
    made = trainer(problem, config, 10, zero_stage)
    rollout = _sampled(made, problem)
    wrong = 0
    sampled = rollout.input_ids[:, rollout.prompt_width :]
    for ids, mask, read, ended in zip(
        sampled, rollout.answer_mask, answer_ids(rollout), rollout.ended.tolist(), strict=True
    ):
        tokens = ids[mask].tolist()
        wanted = [*tokens[:-1], EOS] if tokens[-1] == STOP else tokens
        wrong += read != wanted or ended != (wanted[-1] == EOS) or STOP in tokens[:-1]
    yield Check("answers that a stop string ends wrongly", float(wrong), 0.0)
    scores = answer_scores(made.roles.reward, rollout).cpu().double()
    apart = (scores - problem.raw.flatten()[_places(problem, rollout)]).abs().max()
    yield Check("scores where a stop string ends", float(apart), 1e-4)
