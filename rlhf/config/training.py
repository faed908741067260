"""Settings of a model that trains: weights, adapters, DeepSpeed, optimiser, batches."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlhf.config.base import Fraction, NonNegative, Positive, Section, doc

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class LoraConfig(Section):
    rank: NonNegative = doc(0, "Rank of the adapters; 0 trains all weights.")
    alpha: float = doc(16.0, "Scale: the adapter's output is multiplied by alpha / rank.", gt=0)
    dropout: Fraction = doc(0.0, "Dropout on the adapter's input; step 3 always uses 0.")
    target_modules: str | list[str] = doc(
        "all-linear", "peft's target modules: names, a pattern, or `all-linear`."
    )
    last_layers: Positive | None = doc(
        None, "Adapt only the last so many decoder layers; the others need no backward pass."
    )


class ModelConfig(Section):
    name: str | None = doc(
        None,
        "Hub id, directory, `.gguf` file, `package:NAME[/FILE.gguf]`, `tiny:FAMILY` (made at the "
        "first start), or a bare size (`1.3b` = facebook/opt-1.3b). Unset: the previous step's.",
    )
    dtype: Dtype = doc("auto", "Weights' dtype; auto: bfloat16 on GPU, float32 on CPU.")
    lora: LoraConfig = doc(LoraConfig, "Low-rank adapters (peft).")
    gradient_checkpointing: bool = doc(False, "Recompute activations in the backward pass.")
    attn_implementation: str | None = doc(None, "transformers' attention backend; unset: its own.")
    trust_remote_code: bool = doc(False, "Run Python code that a model repository brings.")


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = doc(0, "ZeRO: what is sharded over the ranks.")
    offload: Literal["none", "cpu", "nvme"] = doc(
        "none", "Where optimiser state (and, at ZeRO-3, weights) lives."
    )
    nvme_path: str | None = doc(None, "Directory for `offload: nvme`.")
    overlap_comm: bool = doc(True, "Overlap gradient reduction with the backward pass.")
    contiguous_gradients: bool = doc(True, "Copy gradients to one buffer as they are made.")
    deepspeed_config: str | None = doc(
        None, "Your own DeepSpeed JSON, merged over ours; `auto` values are filled in."
    )

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> EngineConfig:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload {self.offload!r} needs zero_stage 1, 2 or 3; it is 0")
        if self.offload == "nvme" and (self.zero_stage != 3 or not self.nvme_path):
            raise ValueError("offload 'nvme' needs zero_stage 3 and nvme_path")
        return self


class OptimConfig(Section):
    learning_rate: float = doc(1e-5, "Peak learning rate.", gt=0)
    scheduler: Literal[
        "linear", "cosine", "constant", "cosine_with_restarts", "polynomial", "constant_with_warmup"
    ] = doc("cosine", "Shape of the learning rate over the run.")
    warmup: float = doc(0.0, "Warm-up: optimiser steps, or a share of them when below 1.", ge=0)
    weight_decay: float = doc(0.0, "AdamW's weight decay.", ge=0)
    betas: tuple[float, float] = doc((0.9, 0.95), "AdamW's betas.")
    eps: float = doc(1e-5, "AdamW's epsilon (1e-5: the N implementation details).", gt=0)
    max_grad_norm: float = doc(1.0, "Gradients are clipped to this norm; 0: not clipped.", ge=0)


MICRO_BATCH_TOKENS = (
    "Tokens per forward pass and rank at most: rows times the longest row; unset: not limited. "
    "Short rows then go many together, up to micro_batch_size."
)


class TrainConfig(Section):
    epochs: Positive = doc(1, "Passes over the step's data.")
    max_steps: Positive | None = doc(None, "Stop after so many optimiser steps.")
    batch_size: Positive = doc(32, "Rows per optimiser step, over all ranks.")
    micro_batch_size: Positive = doc(8, "Rows per forward pass and rank.")
    micro_batch_tokens: Positive | None = doc(None, MICRO_BATCH_TOKENS)
    eval_batch_size: Positive = doc(32, "Rows per forward pass and rank in evaluation.")
    eval_every: NonNegative = doc(0, "Evaluate every so many steps too; 0: only per epoch.")
    log_every: Positive = doc(10, "Log every so many optimiser steps.")
