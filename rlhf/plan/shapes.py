"""A decoder's shape, from its Hugging Face configuration."""

from __future__ import annotations

from dataclasses import replace

from rlhf.errors import ConfigError
from rlhf.families import FAMILIES, Config, ModelShape


def shape_of(config: Config, name: str = "the model") -> ModelShape:
    """The shape that a `config.json` describes.

    Raises ConfigError: a family whose shape is not known, or a configuration without its sizes.
    """
    config = config.get("text_config") or config
    model_type = str(config.get("model_type", ""))
    family = FAMILIES.get(model_type)
    if family is None or family.shape is None:
        raise ConfigError(
            f"{name}: the planner does not know the model type {model_type!r}; it knows "
            f"{', '.join(planned_families())}"
        )
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    try:
        return replace(family.shape(config), stored=4 if stored.endswith("float32") else 2)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{name}: its config.json lacks or garbles a size of a {model_type} model: {error}"
        ) from error


def planned_families() -> list[str]:
    """The model types whose memory and time can be planned."""
    return sorted(name for name, family in FAMILIES.items() if family.shape)
