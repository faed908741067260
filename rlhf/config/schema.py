"""Every setting of the pipeline: its type, default, meaning, and the relations it must respect.

Imports anywhere: no torch, no transformers. `RunConfig` is one whole run; each step reads its own
section. Lengths are in tokens; `batch_size` counts rows per optimiser step over all ranks.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from rlhf import stages
from rlhf.config.base import Fraction, NonNegative, Positive, Section, doc
from rlhf.config.limits import LimitsConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.rewards import MODEL, RewardTerm, checked_terms
from rlhf.config.rows import RowsConfig
from rlhf.config.running import CheckpointConfig, HubConfig, LaunchConfig, TrackConfig
from rlhf.config.training import (
    MICRO_BATCH_TOKENS,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from rlhf.errors import ConfigError


class DataConfig(RowsConfig):
    path: list[str] = doc(
        ["sample:courtesy"],
        "Data sets: `sample:courtesy` (ships with the project), files or directories "
        "(json, jsonl, csv, parquet, arrow), http(s) or fsspec URLs, or hub ids.",
        min_length=1,
    )
    columns: dict[str, str] = doc(
        {},
        "What a column is -> its name in the data: `prompt`, `response`, `chosen`, `rejected`, "
        "`messages`, `margin`, `input`, `system`, `tools`, `first`, `second`, `label`, `answers`, "
        "`scores`, `ranks`. The usual names are found without it (docs/data.md).",
    )
    prompt_format: str | None = doc(
        None,
        "Builds the prompt from a row's columns, e.g. "
        '"\\n\\nHuman: {instruction}\\n\\nAssistant:". Unset: the text in the data, as it is.',
    )
    response_format: str = doc(
        "{text}", 'Wraps every answer, e.g. " {text}" where answers lack the leading space.'
    )
    template: str = doc(
        "auto",
        "Chat template of conversations, saved with the model: `auto` (the model's own; "
        "human_assistant where it has none), `human_assistant`, `chatml`, `model` (its own, or "
        "refused) or Jinja text.",
    )
    split: tuple[float, float, float] = doc(
        (2.0, 4.0, 4.0), "Shares of the training rows for steps 1, 2 and 3; normalised to sum to 1."
    )
    hub_split: str = doc("train", "Name of the training split on the hub.")
    hub_eval_split: str | None = doc("test", "Name of the held-out split on the hub, if any.")
    eval_fraction: Fraction = doc(
        0.05,
        "Share of the prompts, with all their rows, held out where a data set brings no test split "
        "of its own. 0, without a test split: nothing is measured.",
    )
    max_eval_rows: Positive = doc(400, "At most so many held-out rows are used.")
    max_train_rows: Positive | None = doc(None, "At most so many training rows per step.")
    max_bad_rows: NonNegative = doc(
        100, "More unusable rows than this stop the run; each is counted and located."
    )
    limits: LimitsConfig = doc(LimitsConfig, "More data than this is refused.")
    cache_dir: str | None = doc(
        None, "Tokenised data; default `~/.cache/rlhf/data` (or $RLHF_CACHE/data)."
    )

    @field_validator("path", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("split", mode="before")
    @classmethod
    def _split_text(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _split_has_rows(self) -> DataConfig:
        if min(self.split) < 0 or sum(self.split) <= 0:
            raise ValueError(f"split {self.split}: shares must be >= 0 and not all 0, e.g. 2,4,4")
        return self


class SFTConfig(Section):
    """Step 1: supervised fine-tuning."""

    model: ModelConfig = doc(ModelConfig, "The base model.")
    engine: EngineConfig = doc(EngineConfig, "DeepSpeed.")
    optim: OptimConfig = doc(OptimConfig, "Optimiser.")
    train: TrainConfig = doc(TrainConfig, "Batches and steps.")
    max_prompt_length: Positive = doc(256, "Prompts over this are cut or dropped.")
    max_length: Positive = doc(512, "Prompt + answer over this: the answer is cut.")
    response_column: Literal["auto", "response", "chosen"] = doc(
        "auto", "The answer to imitate; auto: `response` if the row has it, else `chosen`."
    )
    prompt_loss: bool = doc(False, "Also learn to predict the prompt.")

    @model_validator(mode="after")
    def _lengths(self) -> SFTConfig:
        return _check_lengths(self)


class RewardConfig(Section):
    """Step 2: reward model."""

    model: ModelConfig = doc(ModelConfig, "What it starts from; unset: step 1's model.")
    engine: EngineConfig = doc(EngineConfig, "DeepSpeed.")
    optim: OptimConfig = doc(OptimConfig, "Optimiser.")
    head_learning_rate: float | None = doc(
        None, "Learning rate of the scalar head, if another.", gt=0
    )
    train: TrainConfig = doc(TrainConfig, "Batches and steps; a row is one pair.")
    max_prompt_length: Positive | None = doc(None, "Unset: as in step 1.")
    max_length: Positive | None = doc(None, "Unset: as in step 1.")
    loss: Literal["last", "token_wise"] = doc(
        "last",
        "`last`: one score per answer; `token_wise`: mean over the tokens from the first "
        "difference to each answer's own end (more signal for very small models).",
    )
    margin: float | Literal["column"] = doc(
        0.0, "Subtracted from the score difference; `column`: each row's `margin`."
    )
    group_by_prompt: bool = doc(True, "All pairs of one prompt go into one batch (InstructGPT).")

    @model_validator(mode="after")
    def _lengths(self) -> RewardConfig:
        return _check_lengths(self)


class DPOConfig(Section):
    """DPO, in the place of reward model and PPO: `pipeline: [sft, dpo]`."""

    model: ModelConfig = doc(ModelConfig, "The policy and its reference; unset name: step 1's.")
    engine: EngineConfig = doc(EngineConfig, "DeepSpeed.")
    optim: OptimConfig = doc(OptimConfig, "Optimiser.")
    train: TrainConfig = doc(TrainConfig, "Batches and steps; a row is one pair.")
    max_prompt_length: Positive | None = doc(None, "Unset: as in step 1.")
    max_length: Positive | None = doc(None, "Unset: as in step 1.")
    beta: float = doc(0.1, "How much of the KL to the reference counts; lower: further away.", gt=0)
    loss: Literal["sigmoid", "sigmoid_norm", "ipo"] = doc(
        "sigmoid",
        "`sigmoid`: DPO (arXiv 2305.18290); `sigmoid_norm`: by the answer's tokens, so that length "
        "gains nothing (arXiv 2411.15124); `ipo` (arXiv 2310.12036), by tokens too.",
    )
    label_smoothing: float = doc(
        0.0, "Share of the pairs that are taken to be labelled the wrong way round.", ge=0, lt=0.5
    )

    @model_validator(mode="after")
    def _lengths(self) -> DPOConfig:
        return _check_lengths(self)

    @model_validator(mode="after")
    def _smoothing(self) -> DPOConfig:
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError(
                f"label_smoothing {self.label_smoothing} is for the losses sigmoid and "
                "sigmoid_norm: ipo bounds what a wrong label can do by itself; set it to 0"
            )
        return self


class RolloutConfig(Section):
    engine: Literal["continuous", "hybrid", "vllm"] = doc(
        "continuous",
        "`continuous`: ours, rows retire at EOS; `hybrid`: DeepSpeed's own; `vllm`: vLLM in the "
        "trainer's process.",
    )
    hybrid_kernels: bool = doc(False, "With `hybrid`, DeepSpeed's inference kernels: OPT on a GPU.")
    gather: Literal["auto", "always", "never"] = doc(
        "auto",
        "At ZeRO-3: `always` gathers the whole policy on each rank, once a rollout; `never` layer "
        "by layer for every token, all ranks in step: slow, but no rank holds it whole; `auto`: "
        "whole where it fits.",
    )
    prompts: Positive = doc(64, "Prompts per iteration, over all ranks.")
    samples_per_prompt: Positive = doc(1, "Answers per prompt; group methods need 2 or more.")
    batch_size: Positive = doc(64, "Rows generated at once on a rank.")
    max_prompt_length: Positive | None = doc(None, "Unset: as in step 1.")
    max_new_tokens: Positive = doc(256, "Longest answer.")
    temperature: float = doc(1.0, "Sampling temperature; scoring uses the same.", gt=0)
    stop: list[str] = doc(
        [], "Strings that end an answer; the reward model reads EOS in their place."
    )
    importance_cap: float | None = doc(
        None, "With `vllm`: policy terms are weighted by p / p_vllm, at most this.", ge=1
    )

    @model_validator(mode="after")
    def _layer_by_layer(self) -> RolloutConfig:
        if self.gather == "never" and self.engine != "continuous":
            raise ValueError(
                f"gather 'never' is for engine 'continuous', and {self.engine!r} needs the whole "
                "policy on each rank: use gather auto, or the engine continuous"
            )
        return self

    @model_validator(mode="after")
    def _kernels(self) -> RolloutConfig:
        if self.hybrid_kernels and self.engine != "hybrid":
            raise ValueError(
                f"hybrid_kernels is for engine 'hybrid', and does nothing with {self.engine!r}: "
                "leave it out, or set engine hybrid"
            )
        return self

    @model_validator(mode="after")
    def _importance(self) -> RolloutConfig:
        if self.importance_cap is not None and self.engine != "vllm":
            raise ValueError(
                f"importance_cap {self.importance_cap} corrects for another engine's rounding, and "
                f"engine {self.engine!r} samples with the policy itself: leave it unset"
            )
        return self


class RoleConfig(Section):
    model: ModelConfig = doc(ModelConfig, "Unset name: the parent artifact's model.")
    engine: EngineConfig = doc(EngineConfig, "DeepSpeed.")
    optim: OptimConfig = doc(OptimConfig, "Optimiser.")


class EvalConfig(Section):
    prompts: Positive = doc(128, "Answers of each model to held-out prompts, different ones first.")
    samples: NonNegative = doc(3, "Answers shown side by side.")
    judge: str | None = doc(
        None, "Rule-based judge: `courtesy`, `vader`, or `module:function`; unset: the data's own."
    )
    judge_timeout: float | None = doc(3600.0, "Seconds of a judge for a model's answers.", gt=0)


class RLConfig(Section):
    """Step 3: PPO and its relatives."""

    algorithm: Literal["ppo", "grpo", "rloo", "reinforce++"] = doc("ppo", "How credit is given.")
    rewards: list[RewardTerm] = doc(
        [RewardTerm()],
        "What answers are rewarded by: the weighted sum of these terms (docs/rewards.md), e.g. "
        "`model`, or `[{use: my_module:score}, {use: length, weight: -0.01}]`.",
    )
    actor: RoleConfig = doc(RoleConfig, "The policy.")
    critic: RoleConfig = doc(
        RoleConfig, "The value model; starts from the reward model, or from its own model.name."
    )
    reference_engine: EngineConfig = doc(EngineConfig, "Engine of reference and reward model.")
    rollout: RolloutConfig = doc(RolloutConfig, "Generation.")
    ppo: PPOConfig = doc(PPOConfig, "The algorithm's numbers.")
    share_base: bool | Literal["auto"] = doc(
        "auto",
        "With LoRA: policy, reference, critic and reward model share one frozen base; each has its "
        "own adapters and head. `auto`: where that is possible; true: an error says why not.",
    )
    iterations: Positive | None = doc(None, "Rollouts; unset: one pass over the prompts.")
    micro_batch_size: Positive = doc(16, "Rows per forward pass and rank, scoring and update.")
    micro_batch_tokens: Positive | None = doc(None, MICRO_BATCH_TOKENS)
    log_every: Positive = doc(1, "Log every so many iterations.")
    eval: EvalConfig = doc(EvalConfig, "The verdict at the end.")

    @field_validator("rewards", mode="before")
    @classmethod
    def _one_reward(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, dict)) else value

    @field_validator("rewards")
    @classmethod
    def _rewards(cls, value: list[RewardTerm]) -> list[RewardTerm]:
        return checked_terms(value)

    @property
    def uses_reward_model(self) -> bool:
        """Whether a reward model is among the rewards."""
        return any(term.use == MODEL for term in self.rewards)

    @property
    def kl_place(self) -> Literal["reward", "loss"]:
        """Where the KL to the reference counts: GRPO's own place is the loss (ALGORITHM.md 37)."""
        return self.ppo.kl_in or ("loss" if self.algorithm == "grpo" else "reward")

    @model_validator(mode="after")
    def _kl(self) -> RLConfig:
        fixed, target = self.ppo.kl_loss_coef, self.ppo.kl_target
        if self.kl_place == "loss" and fixed is not None and target is not None:
            raise ValueError(
                f"ppo.kl_loss_coef {fixed} is the weight of the KL loss, so ppo.kl_target {target} "
                "could not adapt it: unset ppo.kl_loss_coef (then ppo.kl_coef is the first value "
                "that adapts), or unset ppo.kl_target"
            )
        return self

    @model_validator(mode="after")
    def _groups(self) -> RLConfig:
        if self.reference_engine.zero_stage not in (0, 3):
            raise ValueError(
                f"reference_engine.zero_stage {self.reference_engine.zero_stage}: reference and "
                "reward model have no optimiser to shard; use 0 (whole) or 3 (weights sharded)"
            )
        stage = self.actor.engine.zero_stage
        if self.rollout.gather == "never" and stage != 3:
            raise ValueError(
                f"rollout.gather 'never' leaves the policy in ZeRO-3's shards, and "
                f"actor.engine.zero_stage is {stage}: set that to 3, or gather to auto"
            )
        n = self.rollout.samples_per_prompt
        if self.algorithm in ("grpo", "rloo") and n < 2:
            raise ValueError(
                f"algorithm {self.algorithm!r} compares answers to one prompt: "
                f"rollout.samples_per_prompt must be 2 or more, it is {n}"
            )
        rows = self.rollout.prompts * n
        if rows % self.ppo.minibatches:
            raise ValueError(
                f"{rows} answers per iteration do not divide into ppo.minibatches = "
                f"{self.ppo.minibatches}: choose a divisor of {rows}"
            )
        return self


class RunConfig(Section):
    """One run: where it goes, what it reads, and the three steps."""

    name: str = doc("run", "The run's directory below output_dir.", pattern=r"^[\w+-][\w.+-]*$")
    output_dir: str = doc("output", "Where runs are kept.")
    seed: int = doc(1234, "Everything random derives from it.", ge=0, lt=2**31)
    pipeline: list[str] = doc(
        list(stages.DEFAULT_PIPELINE),
        "The stages, in order, by name: `sft`, `reward`, `ppo`; or `sft`, `dpo`.",
        min_length=1,
    )
    launch: LaunchConfig = doc(LaunchConfig, "Processes.")
    hub: HubConfig = doc(HubConfig, "Hugging Face hub or a mirror of it.")
    data: DataConfig = doc(DataConfig, "Preference data.")
    step1: SFTConfig = doc(SFTConfig, "Supervised fine-tuning.")
    step2: RewardConfig = doc(RewardConfig, "Reward model.")
    dpo: DPOConfig = doc(DPOConfig, "DPO, where the pipeline has it.")
    step3: RLConfig = doc(RLConfig, "PPO.")
    checkpoint: CheckpointConfig = doc(CheckpointConfig, "Checkpoints and resuming.")
    track: TrackConfig = doc(TrackConfig, "Metrics.")

    @field_validator("pipeline")
    @classmethod
    def _stages(cls, value: list[str]) -> list[str]:
        try:
            return [stage.name for stage in stages.pipeline_of(value)]
        except ConfigError as error:
            raise ValueError(str(error)) from error


class ResolvedStep(Section):
    """What the driver hands to one step's processes, as `resolved.json`."""

    step: Positive = doc(1, "The stage's number.")
    stage: str = doc("", "The stage's name; unset (an older release): the first of that number.")
    run_dir: str = doc("", "The run's directory, absolute.")
    world_size: Positive = doc(1, "Processes over all nodes.")
    parents: dict[str, str] = doc(
        {}, "`sft`, `reward` -> verified artifact directory, HF directory or hub id."
    )
    schema_version: NonNegative = doc(0, "Which release's settings; 0: it was not written yet.")
    data_sources: list[dict[str, Any]] | None = doc(None, "The data's content: rlhf/data/preview.")
    inherited: dict[str, str] = doc({}, "Settings taken from a parent, with where they came from.")
    learning_rate_scale: float = doc(
        1.0, "Learning rates are multiplied by it: lower after the step has diverged once.", gt=0
    )
    config: RunConfig = doc(RunConfig, "The whole run's configuration.")

    @property
    def row(self) -> stages.Stage:
        """All that is known of its kind of stage."""
        return stages.get(self.stage or self.step)


def _check_lengths(section: Any) -> Any:
    prompt, total = section.max_prompt_length, section.max_length
    if prompt and total and prompt >= total:
        raise ValueError(
            f"max_prompt_length {prompt} leaves no room for an answer in max_length {total}"
        )
    return section
