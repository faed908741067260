"""`pytest -n 0 -m gpu tests/gpu`, or all of it by `python -m benchmarks.gpu_day`.

`GPU_TESTS_ON=cpu` runs on a CPU what can run there: it shows that the tests themselves work,
before a GPU is at hand.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.unit import model_help as help_


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU, in a process group of size 1."""
    on_cpu = os.environ.get("GPU_TESTS_ON") == "cpu"
    if not torch.cuda.is_available() and not on_cpu:
        pytest.skip("no GPU here")
    if on_cpu and "float16" in request.node.name:
        pytest.skip("DeepSpeed has no float16 on a CPU")
    help_.world_of_one(monkeypatch)
    return torch.device("cpu") if on_cpu else torch.device("cuda", 0)


@pytest.fixture
def only_gpu(gpu: torch.device) -> torch.device:
    if gpu.type != "cuda":
        pytest.skip("of GPUs alone")
    return gpu
