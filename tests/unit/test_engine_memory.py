"""Peak memory by phase."""

from __future__ import annotations

import sys

import pytest
import torch

from rlhf.engine.memory import peak_memory, peak_since_last
from step3_ppo.experience import Clock

LARGE = 200 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_a_phase_has_its_own_peak() -> None:
    """A large tensor counts in the phase that held it, not in the next, and in the whole."""
    clock = Clock()
    torch.ones(1)
    clock.lap("before")
    tensor = torch.ones(LARGE // 4)
    del tensor
    clock.lap("large")
    torch.ones(1)
    clock.lap("after")
    peaks = clock.peaks
    assert peaks["large"] > peaks["before"] + 0.9 * LARGE
    assert peaks["after"] < peaks["large"] - 0.9 * LARGE
    assert peak_memory() >= peaks["large"]
    assert peak_since_last() < peaks["large"]
