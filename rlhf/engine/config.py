"""The DeepSpeed configuration as a pure function: it can be printed, tested and overridden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.config.schema import EngineConfig
from rlhf.errors import ConfigError

OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def effective_stage(engine: EngineConfig, dtype: str) -> int:
    """ZeRO stage handed to DeepSpeed.

    Stage 0 in 16 bits runs as stage 1: DeepSpeed's stage-0 wrapper for bfloat16 takes other steps
    than its ZeRO stages do, while stage 1 equals fp32 training to rounding and needs less memory
    (docs/decisions/0003-bf16-stage-0.md).
    """
    return 1 if engine.zero_stage == 0 and dtype != "float32" else engine.zero_stage


def deepspeed_config(
    engine: EngineConfig,
    *,
    dtype: str,
    trains: bool,
    max_grad_norm: float = 0.0,
    hidden_size: int = 1024,
    hybrid_max_tokens: int | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration for one engine.

    Args:
        engine: our settings.
        dtype: "float32", "bfloat16" or "float16".
        trains: False for reference and reward models: no optimiser, so only ZeRO-3 shards.
        max_grad_norm: gradient clipping; 0 turns it off.
        hidden_size: sizes ZeRO-3's buckets, as transformers does for "auto".
        hybrid_max_tokens: prompt + answer; turns on DeepSpeedHybridEngine's inference kernels.

    Raises:
        ConfigError: the user's JSON is unreadable, or sets what our own settings decide.
    """
    stage = effective_stage(engine, dtype) if trains else (3 if engine.zero_stage == 3 else 0)
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero["overlap_comm"] = engine.overlap_comm
        zero["contiguous_gradients"] = engine.contiguous_gradients
    if stage == 3:
        zero["reduce_bucket_size"] = hidden_size * hidden_size
        zero["stage3_prefetch_bucket_size"] = int(0.9 * hidden_size * hidden_size)
        zero["stage3_param_persistence_threshold"] = 10 * hidden_size
    if engine.offload != "none" and stage:
        place: dict[str, Any] = {"device": engine.offload, "pin_memory": engine.offload == "cpu"}
        if engine.nvme_path:
            place["nvme_path"] = engine.nvme_path
        if trains:
            zero["offload_optimizer"] = dict(place)
        if stage == 3:
            zero["offload_param"] = dict(place)
    config: dict[str, Any] = {
        # Accumulation and normalisation are ours (rlhf/engine/train.py), so DeepSpeed sees 1.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
    }
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        if trains:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif dtype == "float16":
        config["fp16"] = {"enabled": True}
    if hybrid_max_tokens:
        config["hybrid_engine"] = {
            "enabled": True,
            "max_out_tokens": hybrid_max_tokens,
            "inference_tp_size": 1,
            "release_inference_cache": False,
            "pin_parameters": True,
            "tp_gather_partition_size": 8,
        }
    if engine.deepspeed_config:
        theirs = _read(engine.deepspeed_config)
        _refuse_conflicts(theirs, engine, dtype)
        config = _merge(config, theirs, "")
        config["zero_optimization"]["stage"] = stage
    return config


def _refuse_conflicts(theirs: dict[str, Any], engine: EngineConfig, dtype: str) -> None:
    """Models are read in shards and in a dtype before DeepSpeed sees them: both must agree."""
    path = engine.deepspeed_config
    stage = theirs.get("zero_optimization", {}).get("stage", "auto")
    if stage not in ("auto", engine.zero_stage):
        raise ConfigError(
            f"deepspeed_config {path!r} has ZeRO stage {stage}, the engine's zero_stage is "
            f'{engine.zero_stage}: set zero_stage to {stage}, or the stage in the file to "auto".'
        )
    for section, ours in (("bf16", "bfloat16"), ("fp16", "float16")):
        enabled = theirs.get(section, {}).get("enabled", "auto")
        if enabled not in ("auto", dtype == ours):
            raise ConfigError(
                f"deepspeed_config {path!r} sets {section}.enabled = {enabled}, but the model's "
                f'dtype is {dtype}: set model.dtype, or `enabled` in the file to "auto".'
            )


def _read(path: str) -> dict[str, Any]:
    try:
        loaded = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"deepspeed_config {path!r}: {error}. It must be a readable JSON file."
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"deepspeed_config {path!r}: expected a JSON object at the top.")
    for key in OURS:
        if loaded.get(key, "auto") != "auto":
            raise ConfigError(
                f"deepspeed_config {path!r} sets {key} = {loaded[key]!r}, which our batch_size and "
                'micro_batch_size decide: remove it or set it to "auto".'
            )
    for key in ("optimizer", "scheduler"):
        if _has_numbers(loaded.get(key)):
            raise ConfigError(
                f"deepspeed_config {path!r} has a {key!r} section: set the step's `optim` settings "
                'instead and remove it (values of "auto" may stay).'
            )
        loaded.pop(key, None)
    return loaded


def _has_numbers(section: Any) -> bool:
    if isinstance(section, dict):
        return any(_has_numbers(value) for key, value in section.items() if key != "type")
    return section is not None and section != "auto"


def _merge(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> dict[str, Any]:
    """Theirs over ours; "auto" keeps ours, or leaves DeepSpeed's default where we have none."""
    merged = dict(ours)
    for key, value in theirs.items():
        if value == "auto":
            continue
        if isinstance(value, dict):
            merged[key] = _merge(merged.get(key, {}), value, f"{where}{key}.")
        else:
            merged[key] = value
    return {key: value for key, value in merged.items() if value != {} or key in ours}
