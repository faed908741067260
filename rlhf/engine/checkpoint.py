"""DeepSpeed engines and everything random of a rank, saved and read back to the bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from rlhf.engine import comm
from rlhf.engine.reshard import Shards, put
from rlhf.engine.safe_load import SafeCheckpointEngine
from rlhf.engine.train import TrainEngine
from rlhf.engine.zero3 import full_size
from rlhf.errors import ArtifactError
from rlhf.store.checkpoints import EngineShape


def shape(engine: TrainEngine) -> EngineShape:
    """What the engine's state is of."""
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


def load_engine(
    engine: TrainEngine,
    directory: Path,
    *,
    stage: int,
    world: int,
    learning_rate_scale: float = 1.0,
) -> None:
    """Reads back what `save_engine` wrote at ZeRO `stage` with `world` ranks. Collective.

    Another number of ranks or stage is converted (rlhf/engine/reshard.py). Learning rates and the
    like are those of the settings, at the checkpoint's place in the schedule; the rates are
    multiplied by learning_rate_scale. Raises ArtifactError if the state is not this engine's.
    """
    configured = engine.hyperparameters()
    if (stage, world) == (shape(engine).zero_stage, comm.world_size()):
        _load_as_saved(engine, directory)
    else:
        put(engine, Shards(directory, stage, world, engine.groups))
    engine.set_hyperparameters(configured, learning_rate_scale)


def _load_as_saved(engine: TrainEngine, directory: Path) -> None:
    engine.deepspeed.checkpoint_engine = SafeCheckpointEngine()
    try:
        path, _ = engine.deepspeed.load_checkpoint(
            str(directory), tag="state", load_module_strict=False
        )
    except (KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise ArtifactError(
            f"{directory}: DeepSpeed cannot read this state back ({error}). It must be the same "
            "model; to start the step again: --resume never"
        ) from error
    if path is None:
        raise ArtifactError(
            f"{directory}: DeepSpeed finds no state there; to start the step again: --resume never"
        )


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


def new_random_state(seed: int, position: int, rank: int) -> None:
    """Every generator anew, from the run's seed, the place in the step and the rank."""
    numbers = numpy.random.SeedSequence([seed, position, rank]).generate_state(3)
    random.seed(int(numbers[0]))
    numpy.random.seed(numbers[1])
    torch.manual_seed(int(numbers[2]))
