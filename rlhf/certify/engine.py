"""The same problem through step 3's own rollout, scoring, rewards, credit and update.

The policy is a transformer of one layer, the critic another. The reward model is a table of all
answers with a reward model's interface: what it gives is known, and an answer that step 3 did not
hand over as it was sampled scores 0.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from rlhf.certify.problem import EOS, PAD, VOCAB, Problem
from rlhf.config.schema import EngineConfig, OptimConfig, RunConfig
from rlhf.engine.train import FrozenEngine, TrainEngine
from rlhf.models.causal import CausalModel
from rlhf.models.scalar import ScalarHead, ScalarModel
from step3_ppo.experience import policy_log_probs
from step3_ppo.main import Trainer
from step3_ppo.roles import Roles
from step3_ppo.rollout import Rollout

GROUP, PROMPTS = 4, 128  # answers to a prompt, prompts to an iteration
LETTERS = "_$abcdef"


class Letters:
    """A tokenizer of eight letters, `_` the pad and `$` EOS."""

    pad_token_id, eos_token_id = PAD, EOS

    def __len__(self) -> int:
        return VOCAB

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(LETTERS[i] for i in ids)

    def encode(self, text: str, **_: Any) -> list[int]:
        return [LETTERS.index(letter) for letter in text]


class TableReward(torch.nn.Module):
    """Rewards by looking the whole text up: (B, T) ids and mask -> (B, T) fp32 raw values, 0
    where `read` is False and for a text that is no prompt with an answer to it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=1)
        self.unused = torch.nn.Parameter(torch.zeros(1))  # an engine must have something to hold
        self.statistics = (problem.mean, problem.std)
        self.table: Tensor
        size = (VOCAB + 1) ** (max(map(len, problem.prompts)) + problem.limit)
        self.register_buffer("table", torch.zeros(size))
        for prompt, scores in zip(problem.prompts, problem.raw, strict=True):
            for answer, score in zip(problem.answers, scores, strict=True):
                ids = torch.tensor([[*prompt, *answer]])
                self.table[self._place(ids, torch.ones_like(ids).bool())[0, -1]] = float(score)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, read: Tensor) -> Tensor:
        found = self.table[self._place(input_ids, attention_mask)]
        return torch.where(read, found, 0.0)

    def normalize(self, values: Tensor) -> Tensor:
        return (values - self.statistics[0]) / self.statistics[1]

    def _place(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T): the number of the text that ends there, its real tokens read as digits."""
        position = (mask.long().cumsum(1) - 1).clamp(min=0)
        digits = (ids + 1) * (VOCAB + 1) ** position * mask
        return digits.cumsum(1) % len(self.table)


def settings(algorithm: str, seed: int, problem: Problem, **changes: Any) -> RunConfig:
    """A run's configuration: step 3's defaults but for what the problem says."""
    ppo = {
        "kl_coef": problem.beta,
        "score_clip": problem.clip,
        "missing_eos_penalty": problem.penalty,
        "group_std": False,
        "whiten_advantages": algorithm == "reinforce++",
    } | changes.pop("ppo", {})
    rollout = {
        "prompts": PROMPTS,
        "samples_per_prompt": GROUP,
        "batch_size": PROMPTS * GROUP,
        "max_new_tokens": problem.limit,
    } | changes.pop("rollout", {})
    step3 = {"algorithm": algorithm, "ppo": ppo, "rollout": rollout, "micro_batch_size": 512}
    return RunConfig.model_validate({"seed": seed, "step3": step3 | changes})


def load(problem: Problem, config: RunConfig, steps: int, zero_stage: int = 0) -> Roles:
    """Step 3's roles: policy = reference, a random transformer; a fresh critic; the table."""
    engine = EngineConfig.model_validate({"zero_stage": zero_stage})
    frozen = EngineConfig(zero_stage=3 if zero_stage == 3 else 0)
    critic = None
    if config.step3.algorithm == "ppo":
        optim = OptimConfig(learning_rate=1e-2, scheduler="linear")
        critic = TrainEngine(scalar_model(0.02), engine, optim, dtype="float32", total_steps=steps)
    optim = OptimConfig(learning_rate=3e-3, scheduler="linear")
    return Roles(
        actor=TrainEngine(_policy(), engine, optim, dtype="float32", total_steps=steps),
        reference=FrozenEngine(_policy(), frozen, dtype="float32"),
        reward=FrozenEngine(TableReward(problem), EngineConfig(), dtype="float32"),
        critic=critic,
        actor_dtype="float32",
    )


def _size() -> GPT2Config:
    """With learned positions, so that a prompt's padding must not count."""
    return GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS,
        tie_word_embeddings=False,
    )  # fmt: skip


def _random(model: torch.nn.Module, head: str, scale: float, seed: int) -> None:
    """Embeddings that tell texts apart, attention that sees all of them, a head of some scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                size = scale if head in name else 1.0 if "wte" in name or "wpe" in name else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def _policy() -> CausalModel:
    model = GPT2LMHeadModel(_size())
    _random(model, "lm_head", 0.12, seed=11)
    return CausalModel(model)


def scalar_model(scale: float) -> ScalarModel:
    """A fresh model with one number a token, its head of that scale."""
    config = _size()
    config.num_labels = 1
    model = GPT2ForSequenceClassification(config)
    model.score.__class__ = ScalarHead
    _random(model, "score", scale, seed=12)
    return ScalarModel(model)


def trainer(problem: Problem, config: RunConfig, iterations: int, zero_stage: int = 0) -> Trainer:
    """Step 3's own loop, ready to iterate."""
    from rlhf.engine import comm

    ppo = config.step3.ppo
    roles = load(problem, config, iterations * ppo.epochs * ppo.minibatches, zero_stage)
    rows = [{"prompt_ids": ids, "prompt": LETTERS[ids[0]] * len(ids)} for ids in problem.prompts]
    return Trainer(
        run=SimpleNamespace(config=config, rank=comm.rank(), say=lambda text: None),  # type: ignore[arg-type]
        roles=roles,
        tokenizer=Letters(),
        prompts=datasets.Dataset.from_list(rows * (PROMPTS // len(rows))),
        per_iteration=config.step3.rollout.prompts,
        iterations=iterations,
        world=comm.world_size(),
    )


def all_answers(problem: Problem, device: Any) -> Rollout:
    """Every answer to every prompt, row by row: (P * K) answers."""
    width = max(map(len, problem.prompts))
    ids, mask, answer = [], [], []
    for prompt in problem.prompts:
        left = width - len(prompt)
        for tokens in problem.answers:
            right = problem.limit - len(tokens)
            ids.append([*[PAD] * left, *prompt, *tokens, *[PAD] * right])
            mask.append([*[False] * left, *[True] * (len(prompt) + len(tokens)), *[False] * right])
            answer.append([*[True] * len(tokens), *[False] * right])
    return Rollout(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        answer_mask=torch.tensor(answer, device=device),
        ended=problem.ended.repeat(len(problem.prompts)).to(device),
    )


def answer_log_probs(engine: Any, problem: Problem, temperature: float = 1.0) -> Tensor:
    """(P, K) exact log-probs of all answers."""
    with torch.no_grad():
        rollout = all_answers(problem, engine.device)
        log_probs = policy_log_probs(engine, rollout, temperature)
    return log_probs.sum(1).view(len(problem.prompts), -1).cpu()
