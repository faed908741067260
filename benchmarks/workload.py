"""Models and prompts that the benchmarks share, and one PPO iteration of ours over them.

Weights are random: speed does not depend on them. Where answers end is decided by a constant bias
on the EOS logit, the same on both sides of a comparison: never, or with one chance at every token.
"""

from __future__ import annotations

import atexit
import functools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    OPTConfig,
)

from rlhf.data.plan import Budget

PAD, EOS, BOS = 0, 1, 2
PROMPT, ANSWER, MEAN_EARLY = 128, 64, 24
NEVER = -1e4
MODELS_AT = "RLHF_BENCHMARK_MODELS"


@dataclass(frozen=True)
class Workload:
    """What one iteration does, on either side of a comparison."""

    model: str = "6m"  # a name in CONFIGS
    dtype: str = "bfloat16"
    rows: int = 16
    early: bool = False  # answers of MEAN_EARLY tokens in the mean, at most ANSWER
    epochs: int = 1
    micro: int = 16  # rows in a forward of scoring and update
    micro_tokens: int | None = None  # ours: micro_batch_tokens
    old_log_probs: str = "rollout"  # ours; trl takes them from generation, too
    seed: int = 0


def opt_6m() -> Any:
    """Six layers of width 256: what DeepSpeed-Chat's known figure is for."""
    return OPTConfig(
        vocab_size=4096,
        hidden_size=256,
        word_embed_proj_dim=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        ffn_dim=1024,
        max_position_embeddings=512,
        dropout=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )


def llama_135m() -> Any:
    """SmolLM2-135M's shape, from its config.json."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )


def opt_1_3b() -> Any:
    """facebook/opt-1.3b's shape, from its config.json: for GPUs."""
    return OPTConfig(
        vocab_size=50272,
        hidden_size=2048,
        word_embed_proj_dim=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        ffn_dim=8192,
        max_position_embeddings=2048,
        dropout=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )


CONFIGS = {"6m": opt_6m, "135m": llama_135m, "1.3b": opt_1_3b}


@functools.cache
def model_dirs(name: str, seed: int = 0) -> tuple[str, str]:
    """Directories with a random policy and a random reward model.

    They are removed at the end of the process that made them. Others find them by $MODELS_AT: ranks
    cannot make their own, since in a process group transformers writes on rank 0 alone.
    """
    if MODELS_AT in os.environ:
        root = Path(os.environ[MODELS_AT])
        return str(root / "policy"), str(root / "reward")
    root = Path(tempfile.mkdtemp(prefix=f"rlhf-bench-{name}-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    make_models(name, root, seed)
    return str(root / "policy"), str(root / "reward")


def make_models(name: str, root: Path, seed: int = 0, **how: Any) -> None:
    """Writes root/policy and root/reward; `how` is for `from_config` (dtype)."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    AutoModelForCausalLM.from_config(config, **how).save_pretrained(root / "policy")
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config, **how).save_pretrained(root / "reward")


def lora_reward(name: str, rank: int = 16) -> str:
    """A reward model as step 2 leaves it after training adapters on the policy."""
    from rlhf import models
    from rlhf.config.schema import EngineConfig, ModelConfig
    from rlhf.config.training import LoraConfig

    policy, reward = model_dirs(name)
    path = Path(reward).parent / "lora_reward"
    if not path.exists():
        module = models.load_scalar(
            policy,
            ModelConfig(lora=LoraConfig(rank=rank)),
            engine=EngineConfig(),
            dtype="float32",
            pad_token_id=PAD,
            vocab_size=CONFIGS[name]().vocab_size,
            new_head=True,
        )
        models.Snapshot(module).write(path, _Tokenizer(0), card="")
    return str(path)


def end_answers(model: Any, early: bool) -> None:
    """Gives the head a frozen bias: the pad is never sampled, EOS never or at a constant rate."""
    head = model.get_output_embeddings()
    vocab = head.weight.shape[0]
    bias = torch.zeros_like(head.weight[:, 0])
    bias[PAD] = NEVER
    chance = _chance_of_end()
    bias[EOS] = math.log(vocab - 2) + math.log(chance / (1 - chance)) if early else NEVER
    head.bias = nn.Parameter(bias, requires_grad=False)


def _chance_of_end() -> float:
    """p with E[min(geometric(p), ANSWER)] = MEAN_EARLY, by bisection."""
    low, high = 1e-6, 0.5
    for _ in range(60):
        p = (low + high) / 2
        mean = (1 - (1 - p) ** ANSWER) / p
        low, high = (p, high) if mean > MEAN_EARLY else (low, p)
    return low


def prompts(workload: Workload, batches: int = 1) -> torch.Tensor:
    """(batches * rows, PROMPT) random ids without special tokens."""
    generator = torch.Generator().manual_seed(workload.seed)
    vocab = CONFIGS[workload.model]().vocab_size
    return torch.randint(3, vocab, (batches * workload.rows, PROMPT), generator=generator)


def sft_rows(workload: Workload, steps: int = 4) -> list[dict[str, list[int]]]:
    """Rows of `steps` optimiser steps: prompts of 16 to 128 tokens, answers of 8 to 64."""
    generator = torch.Generator().manual_seed(workload.seed)
    vocab = CONFIGS[workload.model]().vocab_size

    def ids(least: int, most: int) -> list[int]:
        count = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(3, vocab, (count,), generator=generator).tolist()

    return [
        {"prompt_ids": ids(16, PROMPT), "answer_ids": ids(8, ANSWER)}
        for _ in range(workload.rows * steps)
    ]


class OurPPO:
    """Step 3's own acts over the workload: what `Trainer.iterate` runs, without logging."""

    def __init__(
        self,
        workload: Workload,
        changes: dict[str, Any] | None = None,
        reward: str | None = None,
    ) -> None:
        os.environ.setdefault("LOCAL_RANK", "0")
        from rlhf.algo.kl import build_kl_controller
        from rlhf.config.schema import RLConfig
        from rlhf.data.batches import PromptBatch
        from rlhf.engine import comm
        from rlhf.rollout import build_rollout
        from step3_ppo.roles import load_roles

        comm.init_distributed()
        self.workload = workload
        self.settings = RLConfig(**_merged(_settings(workload), changes or {}))
        policy, plain_reward = model_dirs(workload.model, workload.seed)
        self.roles = load_roles(
            self.settings,
            _Tokenizer(CONFIGS[workload.model]().vocab_size),
            sft=policy,
            reward=reward or plain_reward,
            actor_steps=1000,
            critic_steps=1000,
            needs_critic=True,
            say=lambda _: None,
        )
        for engine in (self.roles.actor, self.roles.reference):
            end_answers(_plain(engine), workload.early)
        self.controller = build_kl_controller(0.05, None, 1.0)
        ids = prompts(workload)[comm.rank() :: comm.world_size()]
        ids = ids.to(self.roles.actor.device)
        self.prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), [])
        self.sampler = build_rollout(
            "continuous",
            self.roles.actor.deepspeed,
            SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS),
            batch_size=workload.rows,
            seed=workload.seed,
            rank=comm.rank(),
        )
        self.iterations = 0
        self.reads_apart = False  # benchmarks.ablation: old values from a forward of their own

    def iteration(
        self, around: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext()
    ) -> dict[str, float]:
        """One PPO iteration; each phase inside `around(its name)`.

        Returns each phase's seconds, by CPU time and by the clock, and the iteration's figures. A
        GPU has finished a phase before the clock is read.
        """
        from step3_ppo.experience import generate, reward, score

        settings, roles = self.settings, self.roles
        budget = Budget(settings.micro_batch_size, settings.micro_batch_tokens)
        began = _clocks()
        with around("rollout"), roles.actor.evaluating():
            rollout = generate(self.sampler, self.prompts, settings.rollout)
        sampled = _clocks()
        ppo = settings.ppo
        with around("score"):
            rollout = score(roles, rollout, 1.0, budget, ppo.old_log_probs, values=self.reads_apart)
            rollout, stats = reward(rollout, ppo, self.controller, (0.0, 1.0), kl_in_reward=True)
        scored = _clocks()
        with around("update"):
            stats |= self._update(rollout, budget)
        updated = _clocks()
        self.iterations += 1
        clocks = (began, sampled, scored, updated)
        for name, a, b in zip(("rollout", "score", "update"), clocks, clocks[1:], strict=False):
            stats |= {f"cpu_{name}": b[0] - a[0], f"seconds_{name}": b[1] - a[1]}
        return stats

    def _update(self, rollout: Any, budget: Budget) -> dict[str, float]:
        """Advantages and the optimiser's steps. Returns their figures."""
        from rlhf.algo.algorithms import ALGORITHMS
        from step3_ppo.experience import credit
        from step3_ppo.update import first_critic_step, update

        roles, ppo, algorithm = self.roles, self.settings.ppo, ALGORITHMS["ppo"]
        first = None
        if not self.reads_apart:
            first = first_critic_step(
                roles.critic,
                rollout,
                ppo,
                budget,
                lambda batch: credit(batch, algorithm, ppo, 1, whiten=False).need("returns"),
            )
            rollout = replace(rollout, values=first.values)
        rollout = credit(rollout, algorithm, ppo, 1)
        return update(
            roles.actor,
            roles.critic,
            rollout,
            ppo,
            temperature=1.0,
            micro_batch_size=budget,
            seed=self.iterations,
            began=first,
        )


def _clocks() -> tuple[float, float]:
    """(CPU seconds, seconds by the clock), when all that was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def _settings(workload: Workload) -> dict[str, Any]:
    role = {
        "model": {"dtype": workload.dtype},
        "optim": {"learning_rate": 1e-6, "scheduler": "constant"},
    }
    return {
        "actor": role,
        "critic": role,
        "rollout": {
            "prompts": workload.rows,
            "batch_size": workload.rows,
            "max_prompt_length": PROMPT,
            "max_new_tokens": ANSWER,
        },
        "ppo": {"epochs": workload.epochs, "old_log_probs": workload.old_log_probs},
        "micro_batch_size": workload.micro,
        "micro_batch_tokens": workload.micro_tokens,
    }


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = dict(one)
    for key, value in other.items():
        both[key] = _merged(both.get(key, {}), value) if isinstance(value, dict) else value
    return both


def _plain(engine: Any) -> Any:
    from rlhf.models.adapters import plain

    return plain(engine.module.model)


class _Tokenizer:
    """As much of one as models ask for; nothing is tokenised."""

    pad_token_id, eos_token_id, bos_token_id = PAD, EOS, BOS

    def __init__(self, size: int) -> None:
        self.size = size

    def save_pretrained(self, _: Any) -> None:
        """There is nothing to save."""

    def __len__(self) -> int:
        return self.size
