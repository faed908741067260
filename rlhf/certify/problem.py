"""A problem so small that everything about it can be computed: all answers, their rewards, optima.

Eight tokens; an answer ends at EOS or at the limit. With reward r and coefficient beta the optimum
of E[r] - beta KL(policy || reference) is pi* = reference * exp(r / beta) / Z (docs/certificate.md).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

PAD, EOS, VOCAB = 0, 1, 8
Answer = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """P prompts, K answers to each.

    raw: (P, K) float64, what the reward model gives. mean, std, clip, penalty: how step 3 shapes it
    (ALGORITHM.md 10, 17, 23). beta: the KL coefficient.
    """

    prompts: list[list[int]]
    answers: list[Answer]
    ended: Tensor  # (K,) bool
    raw: Tensor
    mean: float
    std: float
    clip: float
    penalty: float
    beta: float

    @property
    def limit(self) -> int:
        return max(map(len, self.answers))

    @property
    def rewards(self) -> Tensor:
        """(P, K) float64: normalised, clipped, less the penalty for a missing EOS."""
        shaped = ((self.raw - self.mean) / self.std).clamp(-self.clip, self.clip)
        return shaped - self.penalty * (~self.ended)

    def optimum(self, reference: Tensor) -> Tensor:
        """Log-probs of pi* from the reference's: both (P, K)."""
        return (reference.double() + self.rewards / self.beta).log_softmax(1)


def make_problem(
    seed: int, *, limit: int = 2, with_eos: bool = True, prompts: int = 2, beta: float = 0.5
) -> Problem:
    """Random rewards for all answers of at most `limit` tokens to prompts of different lengths.

    Without `with_eos` all answers have `limit` tokens and none is cut off.
    """
    generator = torch.Generator().manual_seed(seed)
    answers = _answers(limit) if with_eos else list(itertools.product(range(VOCAB), repeat=limit))
    ended = torch.tensor([not with_eos or answer[-1] == EOS for answer in answers])
    wide = torch.randn(prompts, len(answers), generator=generator, dtype=torch.float64)
    return Problem(
        prompts=[[2 + index] * (1 + index) for index in range(prompts)],
        answers=answers,
        ended=ended,
        raw=0.7 + 1.5 * wide,
        mean=0.7,
        std=1.5,
        clip=1.5,  # some rewards are beyond it
        penalty=0.5 if with_eos else 0.0,
        beta=beta,
    )


def _answers(limit: int) -> list[Answer]:
    found: list[Answer] = []
    for length in range(1, limit + 1):
        for start in itertools.product([t for t in range(VOCAB) if t != EOS], repeat=length - 1):
            last = range(VOCAB) if length == limit else [EOS]
            found += [(*start, token) for token in last]
    return found


def divergence(policy: Tensor, optimum: Tensor) -> float:
    """KL(policy || optimum) in nats, mean over the prompts: log-probs (P, K) each."""
    policy = policy.double()
    return float((policy.exp() * (policy - optimum)).sum(1).mean())


def group_fixed_point(problem: Problem, reference: Tensor, group: int, kind: str) -> Tensor:
    """Log-probs (P, K) of where GRPO without std ends, with the KL as a loss of that kind.

    A KL loss weighs each token's own KL only, and a group's mean holds the answer itself, so that
    beta becomes beta' = beta n / (n - 1). With Q(s, a) = E[r | s, a] under the policy, V its mean:
    k2: pi(a | s) proportional to ref(a | s) exp(Q / beta'); k3: pi = ref / (1 - (Q - V) / beta').
    """
    beta = problem.beta * group / (group - 1)
    rows = []
    for log_ref, rewards in zip(reference.double(), problem.rewards, strict=True):
        leaf = dict(zip(problem.answers, rewards, strict=True))
        mass = dict(zip(problem.answers, log_ref.exp(), strict=True))
        found: dict[Answer, Tensor] = {}
        _solve((), leaf, mass, beta, kind, torch.zeros(()).double(), found)
        rows.append(torch.stack([found[answer] for answer in problem.answers]))
    return torch.stack(rows)


def _solve(
    prefix: Answer,
    leaf: dict[Answer, Tensor],
    mass: dict[Answer, Tensor],
    beta: float,
    kind: str,
    log_prob: Tensor,
    found: dict[Answer, Tensor],
) -> Tensor:
    """E[r | prefix] under the fixed point; the answers' log-probs go to `found`."""
    if prefix in leaf:
        found[prefix] = log_prob
        return leaf[prefix]
    below = {a: m for a, m in mass.items() if a[: len(prefix)] == prefix}
    tokens = sorted({a[len(prefix)] for a in below})
    size = len(prefix) + 1
    share = torch.stack(
        [sum((m for a, m in below.items() if a[:size] == (*prefix, t)), start=0.0) for t in tokens]  # type: ignore[misc]
    )
    reference = share / share.sum()
    # First the values below (they do not depend on how we got here), then the choice here.
    values = torch.stack(
        [_solve((*prefix, t), leaf, mass, beta, kind, log_prob, {}) for t in tokens]
    )
    policy = _choice(reference, values, beta, kind)
    for token, p in zip(tokens, policy, strict=True):
        _solve((*prefix, token), leaf, mass, beta, kind, log_prob + p.log(), found)
    return (policy * values).sum()


def _choice(reference: Tensor, values: Tensor, beta: float, kind: str) -> Tensor:
    """One state's fixed point: (A,) probabilities."""
    if kind == "k2":
        return (reference.log() + values / beta).softmax(0)
    low, high = values.max() - beta, values.max()  # V is the mean of the values: between these
    for _ in range(200):
        middle = (low + high) / 2
        total = (reference / (1 - (values - middle) / beta)).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    policy = reference / (1 - (values - high) / beta)
    return policy / policy.sum()
