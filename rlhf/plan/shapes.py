"""A decoder's shape, from its Hugging Face configuration."""

from __future__ import annotations

from dataclasses import replace

from rlhf.errors import ConfigError
from rlhf.families import FAMILIES, Config, ModelShape
from rlhf.plan.files.config import size_faults


def shape_of(config: Config, name: str = "the model") -> ModelShape:
    """The shape that a `config.json` describes.

    Raises ConfigError: a family whose shape is not known, or a configuration without its sizes.
    """
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) and inner else config
    model_type = str(config.get("model_type", ""))
    family = FAMILIES.get(model_type)
    if family is None or family.shape is None:
        raise ConfigError(
            f"{name}: the planner does not know the model type {model_type!r}; it knows "
            f"{', '.join(planned_families())}"
        )
    if faults := size_faults(config):
        raise ConfigError(f"{name}: {faults[0].line()}")
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    return replace(family.shape(config), stored=4 if stored.endswith("float32") else 2)


def planned_families() -> list[str]:
    """The model types whose memory and time can be planned."""
    return sorted(name for name, family in FAMILIES.items() if family.shape)
