"""rlhf.engine.config: a pure function; what is refused (CAPABILITIES L4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema import EngineConfig
from rlhf.engine.config import deepspeed_config, effective_stage
from rlhf.errors import ConfigError


def build(engine: EngineConfig | None = None, **changes: Any) -> dict[str, Any]:
    arguments = {"dtype": "float32", "trains": True, "hidden_size": 64} | changes
    return deepspeed_config(engine or EngineConfig(), **arguments)


def with_json(tmp_path: Path, content: Any, **engine: Any) -> EngineConfig:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return EngineConfig(deepspeed_config=str(path), **engine)


def test_the_plain_engine() -> None:
    """L4, 30: DeepSpeed sees no accumulation, and clipping is always stated (its default is 1)."""
    assert build() == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
    }
    assert build(max_grad_norm=0.7)["gradient_clipping"] == 0.7


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages(stage: int) -> None:
    """L4: the stage and its two switches; ZeRO-3's buckets follow the hidden size."""
    settings = EngineConfig(zero_stage=stage, overlap_comm=False, contiguous_gradients=False)
    zero = build(settings)["zero_optimization"]
    sizes = {
        "reduce_bucket_size": 4096,
        "stage3_prefetch_bucket_size": 3686,
        "stage3_param_persistence_threshold": 640,
    }
    expected = {"stage": stage, "overlap_comm": False, "contiguous_gradients": False}
    assert zero == expected | (sizes if stage == 3 else {})
    assert build(settings) == build(settings), "a pure function"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stage_0_in_16_bits_is_stage_1(dtype: str) -> None:
    """docs/decisions/0003: but only for engines that train."""
    assert effective_stage(EngineConfig(), dtype) == 1
    assert effective_stage(EngineConfig(), "float32") == 0
    assert effective_stage(EngineConfig(zero_stage=3), dtype) == 3
    assert build(dtype=dtype)["zero_optimization"]["stage"] == 1
    assert build(dtype=dtype, trains=False)["zero_optimization"] == {"stage": 0}


def test_dtypes() -> None:
    """L4, 33: gradients of bf16 weights are accumulated in fp32."""
    trained = build(dtype="bfloat16")
    assert trained["bf16"] == {"enabled": True}
    assert trained["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in build(dtype="bfloat16", trains=False)
    assert build(dtype="float16")["fp16"] == {"enabled": True}
    assert not {"bf16", "fp16"} & build().keys()


def test_frozen_engines_only_shard_at_stage_3() -> None:
    """L4: without an optimiser there is nothing that stages 1 and 2 could shard."""
    for stage in (1, 2):
        frozen = build(EngineConfig(zero_stage=stage, offload="cpu"), trains=False)
        assert frozen["zero_optimization"] == {"stage": 0}
    frozen = build(EngineConfig(zero_stage=3, offload="cpu"), trains=False)
    assert frozen["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert "offload_optimizer" not in frozen["zero_optimization"]


def test_offload() -> None:
    """L4: optimiser state from stage 1 on, parameters at stage 3; nvme has its path."""
    zero = build(EngineConfig(zero_stage=2, offload="cpu"))["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in zero
    nvme = EngineConfig(zero_stage=3, offload="nvme", nvme_path="/fast")
    zero = build(nvme)["zero_optimization"]
    place = {"device": "nvme", "pin_memory": False, "nvme_path": "/fast"}
    assert zero["offload_optimizer"] == zero["offload_param"] == place


def test_hybrid_engine() -> None:
    assert "hybrid_engine" not in build()
    hybrid = build(hybrid_max_tokens=96)["hybrid_engine"]
    assert hybrid["enabled"]
    assert hybrid["max_out_tokens"] == 96


def test_own_json_is_merged_over_ours(tmp_path: Path) -> None:
    """L4: numbers win; "auto" keeps ours or, where we say nothing, DeepSpeed's default."""
    theirs = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 12345,
            "allgather_bucket_size": "auto",
            "overlap_comm": "auto",
        },
        "wall_clock_breakdown": True,
    }
    made = build(with_json(tmp_path, theirs, zero_stage=2), max_grad_norm=0.5)
    assert "auto" not in json.dumps(made)
    assert made["gradient_clipping"] == 0.5
    assert made["train_micro_batch_size_per_gpu"] == 1
    assert made["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 12345,
    }
    assert made["wall_clock_breakdown"] is True
    assert not {"optimizer", "scheduler", "train_batch_size", "bf16"} & made.keys()
    assert made["fp16"] == {"enabled": False}


def test_own_json_does_not_move_our_stages(tmp_path: Path) -> None:
    """docs/decisions/0003: stage 0 in bf16 stays 1, and a frozen engine's stays 0 or 3."""
    engine = with_json(tmp_path, {"zero_optimization": {"stage": 0}})
    assert build(engine, dtype="bfloat16")["zero_optimization"]["stage"] == 1
    engine = with_json(tmp_path, {"zero_optimization": {"stage": 2}}, zero_stage=2)
    assert build(engine, trains=False)["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"train_batch_size": 8}, ["train_batch_size = 8", '"auto"']),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps", "micro_batch_size"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}, ["optimizer", "optim"]),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, ["scheduler", "remove"]),
        ({"zero_optimization": {"stage": 3}}, ["stage 3", "zero_stage is 0", "set zero_stage"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled = True", "float32", "model.dtype"]),
        ([1, 2], ["JSON object"]),
        ("{not json", ["readable JSON"]),
    ],
)
def test_what_own_json_may_not_set(tmp_path: Path, theirs: Any, words: list[str]) -> None:
    """L4: refused with the value, the rule and the remedy."""
    with pytest.raises(ConfigError) as error:
        build(with_json(tmp_path, theirs))
    for word in words:
        assert word in str(error.value)


def test_own_json_that_is_absent() -> None:
    with pytest.raises(ConfigError, match=r"/nowhere\.json"):
        build(EngineConfig(deepspeed_config="/nowhere.json"))
