"""launch.check_memory on a machine with a GPU: what it has, what fits, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import OPTConfig

from launch.memory import gpu_memory, memory_check, step_report, this_machine
from rlhf.config.load import load_config
from rlhf.config.resolve import resolve_step
from rlhf.config.schema import LaunchConfig
from tests.unit import model_help as help_

pytestmark = pytest.mark.gpu


def test_the_memory_of_the_gpu_is_known_without_torch(only_gpu: torch.device) -> None:
    """nvidia-smi's figure is the device's, but for what the driver keeps."""
    total = torch.cuda.get_device_properties(only_gpu).total_memory
    assert gpu_memory({}) == pytest.approx(total, rel=0.03)


def test_what_cannot_fit_is_refused_before_it_starts(
    only_gpu: torch.device, tmp_path: Path
) -> None:
    """OPT-66B by its configuration alone is refused, a tiny model is not."""
    OPTConfig(
        hidden_size=9216, word_embed_proj_dim=9216, ffn_dim=36864, num_hidden_layers=64,
        num_attention_heads=72,
    ).save_pretrained(tmp_path / "66b")  # fmt: skip
    machine, processes = this_machine(LaunchConfig())
    assert (processes, machine.ranks.on_cpu) == (1, False)
    states = {}
    for name in (help_.tiny(), str(tmp_path / "66b")):
        config = load_config(None, {"step1.model.name": name})
        resolved = resolve_step(config, 1, run_dir=tmp_path / "run", world_size=1, parents={})
        found, why = step_report(resolved, machine, {"sft": None, "reward": None})
        assert found is not None, why
        states[name] = memory_check(found, machine, refuse=True).state
    assert list(states.values()) == ["ok", "FAIL"]
