"""Reading DeepSpeed's files without running what is pickled in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

# What DeepSpeed's optimiser states hold besides tensors and plain values.
_SAFE = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def load_safely(path: Path | str, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """`torch.load` of tensors, plain values and four classes of DeepSpeed; `mmap`: tensors stay in
    the file until they are read, but for torch's older format, which earlier releases wrote."""
    with open(path, "rb") as stream:  # PKZIP's mark: the present format is an archive
        mmap = mmap and stream.read(4) == b"PK\x03\x04"
    with torch.serialization.safe_globals(_SAFE):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


class SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's own, but reading builds tensors and plain values only: no pickled code runs."""

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_safely(path, map_location)
