"""The tables of docs/scaling.md: what models need on 1 to 512 GPUs, and how long step 3 takes.

The work is DeepSpeed-Chat's, so that its published hours can stand beside ours: one epoch over
131 900 prompts of 256 tokens with answers of 256 tokens, 1024 of them per iteration, one epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config.load import load_config
from rlhf.config.schema import RunConfig
from rlhf.plan.advise import Change, Machine, apply, fastest
from rlhf.plan.hardware import GPUS, Speeds
from rlhf.plan.known import known_config
from rlhf.plan.memory import StepMemory, step_memory
from rlhf.plan.report import size
from rlhf.plan.roles import Ranks, Shapes
from rlhf.plan.shapes import shape_of
from rlhf.plan.time import StepTime, step_time
from rlhf.stages import PPO

PROMPTS, PER_ITERATION, PROMPT, ANSWER = 131_900, 1024, 256, 256
GPU_COUNTS = (1, 8, 32, 64, 128, 512)
# (model, reward model)
MODELS = (
    *((f"facebook/opt-{size}", "facebook/opt-350m") for size in ("1.3b", "6.7b", "13b", "30b")),
    ("facebook/opt-66b", "facebook/opt-350m"),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"),
)
HEAD = (
    "| model | GPUs | settings | peak per GPU | RAM per GPU | s/iteration | "
    "compute, generate, send, offload | hours | published |"
)
# Hours of DeepSpeed-Chat's step 3 on A100-80G, from its announcement (tables 1 and 2).
PUBLISHED = {
    ("facebook/opt-6.7b", 8): 4.1,
    ("facebook/opt-13b", 8): 9.0,
    ("facebook/opt-30b", 8): 18.0,
    ("facebook/opt-66b", 8): 50.4,
    ("facebook/opt-13b", 64): 1.25,
    ("facebook/opt-30b", 64): 4.0,
    ("facebook/opt-66b", 64): 7.5,
}


@dataclass(frozen=True)
class Row:
    """One model on one number of GPUs; `changes` None: it does not fit."""

    model: str
    gpus: int
    changes: tuple[Change, ...] | None
    memory: StepMemory | None = None
    time: StepTime | None = None

    @property
    def hours(self) -> float | None:
        """Of all iterations of the work."""
        if self.time is None:
            return None
        return self.time.seconds * (PROMPTS / self.time.rows) / 3600


def work(gpus: int) -> RunConfig:
    """Step 3 as DeepSpeed-Chat measured it; bfloat16 is what `auto` means on a GPU."""
    share = max(PER_ITERATION // gpus, 1)
    return load_config(
        None,
        {
            "step3.rollout.prompts": max(PER_ITERATION, gpus),
            "step3.rollout.batch_size": min(share, 128),
            "step3.rollout.max_prompt_length": PROMPT,
            "step3.rollout.max_new_tokens": ANSWER,
            "step3.ppo.epochs": 1,
            "step3.micro_batch_size": min(share, 16),
        },
    )


def plan_row(model: str, reward: str, gpus: int, speeds: Speeds) -> Row:
    """The fastest way that fits, of those that cost nothing but time; else with adapters."""
    shapes = Shapes(shape_of(known_config(model) or {}), shape_of(known_config(reward) or {}))
    config, ranks = work(gpus), Ranks(gpus, False, min(gpus, 8))
    # 1 TB of RAM a node, as the machines that the published figures come from have about.
    beside = 1e12 / ranks.per_node
    machine = Machine(ranks, speeds, GPUS["a100-80g"].memory, beside)
    changes = fastest(config, PPO, shapes, machine)
    if changes is None:
        return Row(model, gpus, None)
    chosen = apply(config, changes)
    memory = step_memory(chosen, PPO, shapes, ranks)
    return Row(model, gpus, changes, memory, step_time(chosen, PPO, shapes, ranks, speeds))


def tables(speeds: Speeds) -> str:
    """One Markdown table."""
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    for model, reward in MODELS:
        for gpus in GPU_COUNTS:
            lines.append(line(plan_row(model, reward, gpus, speeds)))
    return "\n".join(lines)


def line(row: Row) -> str:
    """A row of the table."""
    name = row.model.split("/")[-1]
    published = PUBLISHED.get((row.model, row.gpus))
    said = f"{published:g}" if published else ""
    if row.changes is None or row.memory is None or row.time is None or row.hours is None:
        return f"| {name} | {row.gpus} | does not fit | | | | | | {said} |"
    beside = size(row.memory.host) if row.memory.host > 1e6 else ""
    words = ", ".join(change.words for change in row.changes) or "the defaults"
    time = row.time
    shares = " ".join(f"{part / time.seconds:.0%}" for part in
                      (time.compute, time.generate, time.send, time.offload))  # fmt: skip
    return (
        f"| {name} | {row.gpus} | {words} | {size(row.memory.peak)} | "
        f"{beside} | {time.seconds:.3g} | {shares} | "
        f"{row.hours:.3g} | {said} |"
    )
