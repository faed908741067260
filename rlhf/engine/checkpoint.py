"""DeepSpeed engines and everything random of a rank, saved and read back to the bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from rlhf.engine.train import TrainEngine
from rlhf.engine.zero3 import full_size
from rlhf.errors import ArtifactError
from rlhf.store.checkpoints import EngineShape

# What DeepSpeed's optimiser states hold besides tensors and plain values.
_SAFE = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's own, but reading builds tensors and plain values only: no pickled code runs."""

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location=map_location, weights_only=True)


def shape(engine: TrainEngine) -> EngineShape:
    """What must be the same for the engine to read this state back."""
    trained = sum(full_size(p) for p in engine.module.parameters() if p.requires_grad)
    dtype = next(engine.module.parameters()).dtype
    stage = engine.config["zero_optimization"]["stage"]
    return EngineShape(
        zero_stage=stage, dtype=str(dtype).removeprefix("torch."), trained_parameters=trained
    )


def save_engine(engine: TrainEngine, directory: Path) -> None:
    """Weights that train, optimiser, scheduler, loss scale. Collective.

    Frozen weights are not written: they are the parent artifact's.
    """
    engine.deepspeed.save_checkpoint(
        str(directory), tag="state", save_latest=False, exclude_frozen_parameters=True
    )


def load_engine(engine: TrainEngine, directory: Path, *, learning_rate_scale: float = 1.0) -> None:
    """Reads back what `save_engine` wrote. Collective.

    Learning rates and the like are those of the settings, at the checkpoint's place in the
    schedule; the rates are multiplied by learning_rate_scale. Raises ArtifactError if the state is
    not this engine's.
    """
    engine.deepspeed.checkpoint_engine = SafeCheckpointEngine()
    configured = engine.hyperparameters()
    try:
        path, _ = engine.deepspeed.load_checkpoint(
            str(directory), tag="state", load_module_strict=False
        )
    except (KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise ArtifactError(
            f"{directory}: DeepSpeed cannot read this state back ({error}). It must be the same "
            "model, ZeRO stage and number of processes; to start the step again: --resume never"
        ) from error
    if path is None:
        raise ArtifactError(
            f"{directory}: DeepSpeed finds no state there; to start the step again: --resume never"
        )
    engine.set_hyperparameters(configured, learning_rate_scale)


def random_state() -> dict[str, Any]:
    """Every generator that this process draws from: Python's, numpy's, torch's, the GPU's."""
    legacy: Any = numpy.random.get_state(legacy=True)
    algorithm, keys, *rest = legacy
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [algorithm, torch.tensor([int(key) for key in keys]), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Continue with the numbers that would have followed `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((algorithm, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
