"""A policy that is a table of logits, trained with this project's own credit and losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algo import losses, rewards
from rlhf.algo.algorithms import ALGORITHMS
from rlhf.certify.problem import VOCAB, Problem, divergence, group_fixed_point

SAMPLES, GROUP, CLIP = 512, 4, 0.2


@dataclass(frozen=True)
class Case:
    """An algorithm, where its KL counts, where it ends: the `optimum` or its own `fixed` point."""

    algorithm: str
    kl_in: str
    ends: str
    kl_loss: str = "k2"

    @property
    def name(self) -> str:
        kind = f" as {self.kl_loss}" if self.kl_in == "loss" else ""
        return f"{self.algorithm}, KL in the {self.kl_in}{kind}"


CASES = (
    Case("ppo", "reward", "optimum"),
    Case("rloo", "reward", "optimum"),
    Case("reinforce++", "reward", "optimum"),
    Case("grpo", "loss", "fixed"),
    Case("grpo", "loss", "fixed", "k3"),
    Case("grpo", "reward", "optimum"),
)


class Table:
    """Logits and values of each state: the start, and one after each first token (answers of 2)."""

    def __init__(self, reference: Tensor) -> None:
        self.logits = reference.clone().requires_grad_()
        self.values = torch.zeros(len(reference), requires_grad=True)

    def answers(self) -> Tensor:
        """(K,) log-probs of all answers of two tokens, in the order of `Problem.answers`."""
        log_p = self.logits.log_softmax(1)
        return (log_p[0].unsqueeze(1) + log_p[1:]).flatten()


def train(problem: Problem, case: Case, seed: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Log-probs (1, K) of the trained table, and of the reference."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(1 + VOCAB, VOCAB, generator=generator) * 0.7
    table = Table(reference)
    ref_log_p = reference.log_softmax(1)
    reward = problem.rewards[0].float()
    optimizer = torch.optim.Adam([table.logits, table.values], lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / iterations / 2)
    mask = torch.ones(SAMPLES, 2, dtype=torch.bool)
    for _ in range(iterations):
        with torch.no_grad():
            first, second = _draw(table, generator)
            states = torch.stack([torch.zeros_like(first), 1 + first], 1)
            tokens = torch.stack([first, second], 1)
            old = table.logits.log_softmax(1)[states, tokens]
            ref, values = ref_log_p[states, tokens], table.values[states]
            scores = reward[first * VOCAB + second]
            coef = problem.beta if case.kl_in == "reward" else 0.0
            advantages, returns = ALGORITHMS[case.algorithm].credit(
                token_rewards=rewards.token_rewards(scores, old, ref, mask, coef),
                values=values,
                mask=mask,
                group_size=GROUP,
                gamma=1.0,
                lam=0.95,
                whiten=case.algorithm == "reinforce++",
                group_std=False,
            )
        for _ in range(2):
            new = table.logits.log_softmax(1)[states, tokens]
            loss, _ = losses.policy_loss(new, old, advantages, mask, CLIP)
            if case.kl_in == "loss":
                loss = loss + problem.beta * losses.kl_loss(new, ref, mask, case.kl_loss)[0]
            if returns is not None:
                loss = (
                    loss + losses.value_loss(table.values[states], values, returns, mask, None)[0]
                )
            optimizer.zero_grad()
            (loss / mask.sum()).backward()
            optimizer.step()
            schedule.step()
    start = Table(reference)
    return table.answers().detach()[None], start.answers().detach()[None]


def distance(problem: Problem, case: Case, seed: int, iterations: int) -> float:
    """Nats from where the case must end, after training."""
    policy, reference = train(problem, case, seed, iterations)
    if case.ends == "optimum":
        return divergence(policy, problem.optimum(reference))
    return divergence(policy, group_fixed_point(problem, reference, GROUP, case.kl_loss))


def _draw(table: Table, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    p = table.logits.softmax(1)
    first = torch.multinomial(p[0], SAMPLES, replacement=True, generator=generator)
    second = torch.multinomial(p[1 + first], 1, generator=generator).squeeze(1)
    return first, second
