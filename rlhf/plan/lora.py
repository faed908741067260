"""What adapters add, from a model's shape."""

from __future__ import annotations

import re

from rlhf.config.training import LoraConfig
from rlhf.families import Linear, ModelShape


def adapted_layers(shape: ModelShape, lora: LoraConfig) -> int:
    """Decoder layers that get adapters."""
    return min(lora.last_layers or shape.layers, shape.layers) if lora.rank else 0


def adapted_linears(shape: ModelShape, lora: LoraConfig) -> list[Linear]:
    """The matrices of a layer that get adapters."""
    return [linear for linear in shape.linears if _targets(linear, lora)]


def adapter_parameters(shape: ModelShape, lora: LoraConfig) -> int:
    """Trainable parameters of the adapters: rank x (inputs + outputs) of each adapted matrix."""
    if not lora.rank:
        return 0
    per_layer = sum(linear.inputs + linear.outputs for linear in adapted_linears(shape, lora))
    outside = [linear for linear in shape.outside_linears if _targets(linear, lora)]
    if lora.last_layers:
        outside = []
    extra = sum(linear.inputs + linear.outputs for linear in outside)
    return lora.rank * (adapted_layers(shape, lora) * per_layer + extra)


def _targets(linear: Linear, lora: LoraConfig) -> bool:
    """As peft matches: all of them, names, or a pattern over the whole dotted name."""
    wanted = lora.target_modules
    if wanted == "all-linear":
        return True
    if isinstance(wanted, str):
        return wanted == linear.name or bool(re.fullmatch(wanted, f"layers.0.block.{linear.name}"))
    return linear.name in {name.rsplit(".", 1)[-1] for name in wanted}
