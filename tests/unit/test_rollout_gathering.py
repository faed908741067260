"""Whole or layer by layer: `step3.rollout.gather` (on two real ranks: test_engine_ranks.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.load import load_config
from rlhf.config.resolve import decisive
from rlhf.engine import comm, memory
from rlhf.errors import ConfigError
from rlhf.rollout import gathering as rule
from rlhf.stages import PPO

GB = 10**9


class Sharded(torch.nn.Module):
    """1 GB of fp32 in shards, as far as anybody asks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: Any = torch.nn.Parameter(torch.zeros(1))
        self.weight.ds_id, self.weight.ds_numel = 0, GB // 4


def free(monkeypatch: pytest.MonkeyPatch, ranks: list[tuple[str, float | None]]) -> None:
    monkeypatch.setattr(comm, "gather_lists", lambda mine: ranks)


@pytest.mark.parametrize(
    ("setting", "engine", "whole"),
    [("always", "continuous", True), ("never", "continuous", False), ("auto", "hybrid", True),
     ("auto", "vllm", True)],
)  # fmt: skip
def test_a_choice_is_followed(setting: str, engine: str, whole: bool) -> None:
    found = rule(setting, engine, Sharded())
    assert found.whole is whole
    assert found.options["lockstep"] is not whole
    assert "1.00 GB" in found.why


def test_weights_that_are_whole_need_nothing() -> None:
    for setting in ("auto", "always", "never"):
        found = rule(setting, "continuous", torch.nn.Linear(2, 2))
        assert (found.whole, found.why) == (True, "")


@pytest.mark.parametrize(
    ("ranks", "whole"),
    [
        ([("a", 3 * GB), ("a", 3 * GB)], True),
        ([("a", 1.9 * GB), ("a", 1.9 * GB)], False),  # two share it
        ([("a", 1.9 * GB), ("b", 1.9 * GB)], True),  # each its own machine's
        ([("a", 3 * GB), ("b", 0.9 * GB)], False),  # all follow the one with least
        ([("a", None), ("b", None)], True),
    ],
)
def test_auto_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, ranks: list[tuple[str, float | None]], whole: bool
) -> None:
    """Whole, unless the RAM is too small for certain."""
    free(monkeypatch, ranks)
    assert rule("auto", "continuous", Sharded()).whole is whole


@pytest.mark.parametrize(("room", "whole"), [(2.6, True), (2.4, False)])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, room: float, whole: bool) -> None:
    """With room for what is repacked and for the cache; GPUs are not shared."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda: (0, 0))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    free(monkeypatch, [("a", room * GB), ("a", room * GB)])
    found = rule("auto", "continuous", Sharded())
    assert found.whole is whole
    assert "step3.rollout.gather" in found.why


def test_available_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The least of what the machine has free and what the cgroup still allows."""
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  5000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_memory() == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory.available_memory() == 5000 * 1024
    (tmp_path / "memory.max").write_text("51000\n")
    assert memory.available_memory() == 50000
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    (tmp_path / "memory.max").unlink()
    assert memory.available_memory() is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"step3.rollout.engine": "vllm"}, "'vllm' needs the whole policy on each rank"),
        ({"step3.rollout.engine": "hybrid"}, "'hybrid' needs the whole policy on each rank"),
        ({"step3.actor.engine.zero_stage": 2}, "actor.engine.zero_stage is 2: set that to 3"),
    ],
)
def test_never_is_refused_where_it_means_nothing(settings: dict[str, Any], said: str) -> None:
    zero3 = {"step3.actor.engine.zero_stage": 3, "step3.rollout.gather": "never"}
    load_config(None, zero3)
    with pytest.raises(ConfigError, match=said):
        load_config(None, zero3 | settings)


def test_a_run_goes_on_with_another_choice() -> None:
    """From a checkpoint: the same result but for rounding."""
    whole = load_config(None, {"step3.rollout.gather": "always"}).model_dump()
    assert decisive(whole, PPO) == decisive(load_config(None).model_dump(), PPO)
