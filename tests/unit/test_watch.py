"""Silent corruption and slow ranks (issue 11): planted in one of two real ranks, and named.

All cases run in one start of the two ranks (tests/unit/watch_worker.py).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.load import load_config
from rlhf.engine.integrity import bit_sum
from rlhf.errors import ConfigError
from rlhf.stragglers import slow_ranks
from tests.unit import model_help as help_
from tests.unit.ranks_help import two_ranks
from tests.unit.watch_worker import CASES


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("watch")
    help_.tiny(), help_.lively(), help_.reward_dir()  # made here, since ranks would race
    two_ranks("tests.unit.watch_worker", out, "fast", "slow", *CASES)
    return out


def told(ranks: Path, case: str) -> dict[str, Any]:
    return dict(json.loads((ranks / f"{case}.json").read_text()))


# What is said, and how many of the four saves of step 1 (three of step 3) there were before it.
DAMAGE = {
    "sft-zero0": ["model: model.model.layers.1.mlp.down_proj.weight: different bits"],
    "sft-zero2": ["model: model.model.layers.1.mlp.down_proj.weight: different bits"],
    "sft-zero3": ["model: model.model.layers.0.input_layernorm.weight: different bits"],
    "sft-moment": ["model: exp_avg of model.model.layers.0.input_layernorm.weight: different bits"],
    "actor": ["actor: model.model.layers.1.mlp.down_proj.weight: different bits"],
    "critic": ["critic: model.model.layers.1.mlp.down_proj.weight: different bits"],
    "ema": ["ema: average of model.model.norm.weight: different bits"],
    "reference": ["rank 1 on ", "reference: model.model.layers.1", "changed since it was loaded"],
    "reward": ["rank 1 on ", "reward model: model.model.layers.1", "changed since it was loaded"],
    "processor": ["rank 1 on ", "critic gives another result for the same rows"],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_before_it_is_saved(ranks: Path, case: str) -> None:
    """On both ranks with the same words, and the checkpoint from before it is the newest."""
    found = told(ranks, case)
    first, second = found["errors"]
    assert first == second
    for part in DAMAGE[case]:
        assert part in first
    assert "(seen after 2" in first
    assert "The same command goes on from the last checkpoint" in first
    assert found["saved"] == ["step-00000001"]


@pytest.mark.parametrize("case", ["clean-sft", "clean-ppo", "clean-zero3", "off"])
def test_sound_ranks_come_to_their_end(ranks: Path, case: str) -> None:
    """`off`: check_every 0 looks at nothing, whatever is wrong."""
    assert told(ranks, case)["errors"] == ["", ""]


def test_a_slow_rank_is_named_with_its_phase(ranks: Path) -> None:
    found = told(ranks, "slow")
    (said,) = found["said"]
    assert "rank 1 on " in said
    assert "in the phase `data`" in said
    assert "launch.straggler_factor" in said
    assert found["rows"]["ranks/seconds_data_slowest_rank"] == 1
    assert found["rows"]["ranks/seconds_data_max"] > 0.2  # five steps of 0.05 s
    table = found["table"][-1]
    assert table["step"] == 90
    own = table["seconds"]
    assert own["data"][1] == max(own["data"])
    # Rank 0 waits for rank 1 in its update, and that is not its own work.
    assert own["update"][0] < own["data"][1]


def test_ranks_that_are_alike_are_not_named(ranks: Path) -> None:
    assert told(ranks, "fast")["said"] == []


def test_the_median_is_that_of_the_others() -> None:
    """With two ranks the median of both is their mean: a rank 100 times as slow is 1.98 of it."""
    assert slow_ranks([1.0, 100.0], 2.0, 0.0) == {1: 100.0}
    assert slow_ranks([1.0, 1.9], 2.0, 0.0) == {}
    assert slow_ranks([3.0, 1.0, 1.0, 5.0], 2.0, 0.0) == {0: 3.0, 3: 5.0}
    assert slow_ranks([0.0, 0.004], 2.0, 0.1) == {}
    assert slow_ranks([0.0, 4.0], 2.0, 0.1) == {1: math.inf}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_bit_counts(dtype: torch.dtype) -> None:
    """Each bit of each number, in tensors of odd sizes and at odd places of their storage."""
    whole = torch.randn(12, dtype=torch.float64).to(dtype)
    for tensor in (whole[1:12], whole[:1], whole.view(3, 4).T):
        before = int(bit_sum(tensor))
        assert before == int(bit_sum(tensor.clone()))
        raw = whole.view(torch.uint8)
        changed = 0
        for octet in range(len(raw)):
            for bit in range(8):
                raw[octet] ^= 1 << bit
                changed += int(bit_sum(tensor)) != before
                raw[octet] ^= 1 << bit
        assert changed == tensor.numel() * tensor.element_size() * 8


def test_what_would_name_fast_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="give a number over 1"):
        load_config(None, {"launch.straggler_factor": 0.5})
