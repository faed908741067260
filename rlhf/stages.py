"""The kinds of stage that a pipeline is made of: one row each.

All that the driver, the planner, the store and the data know about a kind of stage stands in its
row; no other file knows a stage's number. A recipe's `pipeline` lists stages by name. A new kind is
a row here and a folder with its `main.py`; a row from elsewhere is added with `register`.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlhf.errors import ConfigError

Rows = Literal["answers", "pairs", "prompts"]


@dataclass(frozen=True)
class Need:
    """An artifact that a stage starts from."""

    kind: str
    named_by: str = ""
    """The setting that, where it is set, names a model to use in its place."""
    when: str = ""
    """What of the configuration says whether it is needed; always, where this is empty."""
    spared_by: str = ""
    """The setting that, where it is set, makes the artifact one that a stage can do without."""


@dataclass(frozen=True, eq=False)
class Stage:
    """One kind of stage; equal to itself alone."""

    name: str
    number: int
    """What `--step` takes; no two stages of one pipeline have the same."""
    title: str
    folder: str
    """Of its scripts, below the project; of all that it writes, below the run."""
    makes: str
    """The kind of its artifact."""
    rows: Rows
    """What it reads of the data: answers to imitate, pairs to compare, or prompts alone."""
    shares: tuple[int, ...]
    """Which of data.split's shares it trains on, counted from 1."""
    section: str
    """Its part of the configuration."""
    models: tuple[str, ...]
    """What it trains: places in the configuration that have `model` and `engine`."""
    batch: str
    """The setting that counts the rows of an optimiser step, over all ranks."""
    micro_batch: str
    """The setting that counts the rows of a forward pass on one rank."""
    zero_flag: str
    """train.py's flag for its ZeRO stage."""
    needs: tuple[Need, ...] = ()
    base: str = ""
    """The setting that names the model it starts from, if that may be one that is not ours."""
    model_flag: str = ""
    """train.py's flag for that; where another stage needs the artifact and this one has not run, it
    names a model in the artifact's place."""
    scalar: bool = False
    """Its model has a scalar head: it scores an answer."""
    generates: bool = False
    """It trains on answers that its own policy writes, iteration by iteration."""
    parts: tuple[str, ...] = ()
    """Models of their own inside its artifact."""
    evaluates: bool = False
    """Its artifact is evaluated by a script of its own, `evaluation.py`, after it is published."""
    measured: str = ""
    """The figure on held-out rows by which it is known."""
    curves: tuple[tuple[str, str], ...] = ()
    """Of its metrics those to be shown first: (metric, its name for a person)."""
    inherits: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """A setting that may be left unset -> (kind of parent, the parent's setting that it takes)."""
    model_from: Mapping[str, str] = field(default_factory=dict)
    """A model that may be left unset -> the kind of parent whose model it takes."""

    @property
    def model(self) -> str:
        """The setting of the first model that it trains."""
        return f"{self.models[0]}.model"

    def __str__(self) -> str:
        return f"step {self.number}"


SFT = Stage(
    name="sft",
    number=1,
    title="SFT",
    folder="step1_sft",
    makes="sft",
    rows="answers",
    shares=(1,),
    section="step1",
    models=("step1",),
    batch="step1.train.batch_size",
    micro_batch="step1.train.micro_batch_size",
    zero_flag="--actor-zero-stage",
    base="step1.model.name",
    model_flag="--actor-model",
    measured="perplexity",
    curves=(("eval/perplexity", "perplexity, held out"), ("train/loss", "loss")),
)
REWARD = Stage(
    name="reward",
    number=2,
    title="reward model",
    folder="step2_reward",
    makes="reward",
    rows="pairs",
    shares=(2,),
    section="step2",
    models=("step2",),
    batch="step2.train.batch_size",
    micro_batch="step2.train.micro_batch_size",
    zero_flag="--reward-zero-stage",
    needs=(Need("sft", spared_by="step2.model.name"),),
    base="step2.model.name",
    model_flag="--reward-model",
    scalar=True,
    measured="accuracy",
    curves=(("eval/accuracy", "accuracy, held out"), ("train/loss", "loss")),
    inherits={
        "step2.max_prompt_length": ("sft", "step1.max_prompt_length"),
        "step2.max_length": ("sft", "step1.max_length"),
        "data.template": ("sft", "data.template"),
    },
    model_from={"step2.model.name": "sft"},
)
DPO = Stage(
    name="dpo",
    number=2,
    title="DPO",
    folder="step2_dpo",
    makes="dpo",
    rows="pairs",
    shares=(2, 3),
    section="dpo",
    models=("dpo",),
    batch="dpo.train.batch_size",
    micro_batch="dpo.train.micro_batch_size",
    zero_flag="--actor-zero-stage",
    needs=(Need("sft", named_by="dpo.model.name"),),
    measured="accuracy",
    curves=(
        ("eval/accuracy", "accuracy, held out"),
        ("train/loss", "loss"),
        ("train/chosen_reward", "reward of chosen"),
        ("train/rejected_reward", "reward of rejected"),
    ),
    inherits={
        "dpo.max_prompt_length": ("sft", "step1.max_prompt_length"),
        "dpo.max_length": ("sft", "step1.max_length"),
        "data.template": ("sft", "data.template"),
    },
    model_from={"dpo.model.name": "sft"},
)
PPO = Stage(
    name="ppo",
    number=3,
    title="PPO",
    folder="step3_ppo",
    makes="ppo",
    rows="prompts",
    shares=(3,),
    section="step3",
    models=("step3.actor", "step3.critic"),
    batch="step3.rollout.prompts",
    micro_batch="step3.micro_batch_size",
    zero_flag="--actor-zero-stage",
    needs=(
        Need("sft", named_by="step3.actor.model.name"),
        Need("reward", when="step3.uses_reward_model"),
    ),
    generates=True,
    parts=("actor", "critic", "actor_ema"),
    evaluates=True,
    curves=(
        ("score_normalised", "reward, normalised"),
        ("kl_per_answer", "KL, nats an answer"),
        ("answer_length", "length, tokens"),
        ("eos_fraction", "answers that end"),
        ("entropy", "entropy, nats"),
        ("clip_fraction", "clip fraction"),
        ("explained_variance", "explained variance"),
    ),
    inherits={
        "step3.rollout.max_prompt_length": ("sft", "step1.max_prompt_length"),
        "data.template": ("sft", "data.template"),
    },
    model_from={"step3.actor.model.name": "sft", "step3.critic.model.name": "reward"},
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in (SFT, REWARD, DPO, PPO)}
DEFAULT_PIPELINE = ("sft", "reward", "ppo")


def register(stage: Stage) -> None:
    """Adds a kind of stage. Raises ConfigError if its name, folder or artifact is taken."""
    for other in STAGES.values():
        for what in ("name", "folder", "makes"):
            if getattr(stage, what) == getattr(other, what):
                raise ConfigError(
                    f"stage {stage.name!r}: the {what} {getattr(stage, what)!r} is that of stage "
                    f"{other.name!r}: choose another"
                )
    STAGES[stage.name] = stage


def get(key: Stage | str | int) -> Stage:
    """A stage by its name; by its number, the first that has it. Raises ConfigError."""
    if isinstance(key, Stage):
        return key
    for stage in STAGES.values():
        if key in (stage.name, stage.number):
            return stage
    known = ", ".join(f"{stage.number} ({name})" for name, stage in STAGES.items())
    raise ConfigError(f"step {key}: the steps are {known}")


def maker_of(kind: str) -> Stage:
    """The stage that makes this kind of artifact. Raises ConfigError."""
    for stage in STAGES.values():
        if stage.makes == kind:
            return stage
    raise ConfigError(f"artifact {kind!r}: no stage makes it")


def pipeline_of(names: Iterable[str]) -> list[Stage]:
    """The stages of a pipeline, in their order. Raises ConfigError where they are none."""
    found: list[Stage] = []
    for name in names:
        if name not in STAGES:
            raise ConfigError(f"pipeline: no stage {name!r}: there are {', '.join(STAGES)}")
        found.append(STAGES[name])
    numbers = [stage.number for stage in found]
    if not found or sorted(set(numbers)) != numbers:
        told = ", ".join(f"{stage.name} ({stage.number})" for stage in found) or "nothing"
        raise ConfigError(
            f"pipeline: {told}: name one stage or more, each number once, in ascending order"
        )
    return found


def chosen(pipeline: Sequence[Stage], numbers: Iterable[int] | None) -> list[Stage]:
    """Those of a pipeline's stages that `--step` asks for; all without it. Raises ConfigError."""
    asked = {stage.number for stage in pipeline} if numbers is None else set(numbers)
    if unknown := sorted(asked - {stage.number for stage in pipeline}):
        has = ", ".join(f"{stage.number} {stage.title}" for stage in pipeline)
        raise ConfigError(f"--step {unknown[0]}: the pipeline has {has}")
    return [stage for stage in pipeline if stage.number in asked]
