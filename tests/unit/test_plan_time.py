"""FLOPs against torch's own counter, bytes sent as measured on the wire, and what follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config.load import load_config
from rlhf.config.schema import EngineConfig, ModelConfig
from rlhf.config.training import LoraConfig
from rlhf.errors import ConfigError
from rlhf.families import tiny_settings
from rlhf.plan import read
from rlhf.plan.hardware import GPUS, Speeds, gpu_speeds, parse_bytes
from rlhf.plan.known import known_config
from rlhf.plan.roles import Ranks, Role, Shapes, make_role
from rlhf.plan.shapes import shape_of
from rlhf.plan.time import (
    forward_flops,
    generation_seconds,
    offload_seconds,
    sent_per_step,
    step_time,
    training_flops,
)
from rlhf.stages import get

OPT = shape_of(known_config("facebook/opt-125m") or {})
ONE = Speeds(flops=1e12, memory=1e11, inside=1e10, between=1e9)


def role(stage: int, *, world: int = 4, trains: bool = True, **model: Any) -> Role:
    engine = EngineConfig(zero_stage=stage)  # type: ignore[arg-type]
    ranks = Ranks(world, True)
    return make_role(OPT, ModelConfig(**model), engine, ranks, scalar=False, trains=trains)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "gpt_neox"])
def test_flops_of_a_forward_are_those_that_torch_counts(family: str) -> None:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(**tiny_settings(family), vocab_size=1024, **special)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        ids = torch.zeros(3, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    shape = shape_of(read.tiny_config(family))
    # The counter takes attention's products over the whole width; ours count the causal half.
    half = 4.0 * shape.layers * shape.query_width * 64 / 2 * 3 * 64
    assert forward_flops(shape, 3 * 64, 64) + half == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def test_training_is_three_forwards_and_checkpointing_a_fourth() -> None:
    forward = forward_flops(OPT, 100, 50)
    assert training_flops(role(0), 100, 50) == 3 * forward
    assert training_flops(role(0, gradient_checkpointing=True), 100, 50) == 4 * forward
    assert training_flops(role(0, lora=LoraConfig(rank=4)), 100, 50) == 2 * forward
    # 6 N D, but for embedding rows that are only looked up, and attention's own products.
    positions = 2050 * 768
    plain = 6 * (OPT.causal - positions) * 100
    assert 3 * forward_flops(OPT, 100, 0.0) == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize(("stage", "units"), [(0, 2), (1, 3), (2, 2 * 5 + 1), (3, 3 * 5)])
def test_bytes_sent_are_those_measured_on_the_wire(stage: int, units: int) -> None:
    """MULTINODE: u = bytes x parameters x (N - 1) / N, with 5 passes a step and 4 ranks."""
    assert sent_per_step(role(stage), 4, 5) == pytest.approx(units * 4 * OPT.causal * 3 / 4)


def test_one_rank_sends_nothing_and_adapters_little() -> None:
    assert sent_per_step(role(2, world=1), 1, 5) == 0
    assert sent_per_step(role(0, lora=LoraConfig(rank=4)), 4, 5) < 0.02 * sent_per_step(
        role(0), 4, 5
    )


def test_decoding_is_bound_by_memory_and_prefill_by_compute() -> None:
    """One row: 10 steps that read all weights and the cache; the prompt's FLOPs before."""
    one = role(0, world=1)
    cache = 2 * 12 * 768 * 4 * (20 + 5)
    seconds = 10 * (4 * OPT.causal + cache) / 1e11 + forward_flops(OPT, 20, 20) / 1e12
    assert generation_seconds(one, ONE, 1, 1, 20, 10) == pytest.approx(seconds)
    # 4 rows at once read the weights once; 4 in turns read them 4 times.
    together = generation_seconds(one, ONE, 4, 4, 20, 10)
    assert generation_seconds(one, ONE, 4, 1, 20, 10) > 2.5 * together


def test_offloading_costs_transfers_and_an_optimiser_in_ram() -> None:
    engine = EngineConfig(zero_stage=2, offload="cpu")
    made = make_role(OPT, ModelConfig(dtype="bfloat16"), engine, Ranks(2, False),
                     scalar=False, trains=True)  # fmt: skip
    share = OPT.causal / 2
    assert offload_seconds(made, 2, 3, ONE) == pytest.approx(4 * share / 20e9 + 28 * share / 20e9)
    assert offload_seconds(role(2), 2, 3, ONE) == 0


@pytest.mark.parametrize("step", [1, 2, 3])
def test_more_ranks_are_faster_and_parts_add_up(step: int) -> None:
    config = load_config(None)
    one, eight = (
        step_time(config, get(step), Shapes(OPT, OPT), Ranks(n, False, n), ONE) for n in (1, 8)
    )
    assert eight.compute == pytest.approx(one.compute / 8, rel=0.01)
    assert one.sent == 0 < eight.sent
    assert (one.generate > 0) == (step == 3)
    for found in (one, eight):
        parts = found.compute + found.generate + found.send + found.offload
        assert found.seconds == pytest.approx(parts)
    apart = step_time(config, get(step), Shapes(OPT, OPT), Ranks(8, False, 4), ONE)
    assert apart.send == pytest.approx(10 * eight.send)  # the slower link


def test_amounts_of_memory() -> None:
    assert parse_bytes("80GB") == parse_bytes("80 g") == 80e9
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("1.5TB") == 1.5e12
    assert parse_bytes("1000") == 1000
    for wrong in ("80 apples", "", "-3GB", "0GB"):
        with pytest.raises(ConfigError, match="80GB or 24GiB"):
            parse_bytes(wrong)
    assert gpu_speeds("A100-80G").flops == 0.4 * GPUS["a100-80g"].flops
    with pytest.raises(ConfigError, match="a100-80g"):
        gpu_speeds("a200")
