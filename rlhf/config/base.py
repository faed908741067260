"""What every section of the settings is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


def doc(default: Any, text: str, **limits: Any) -> Any:
    """A field with its default and the line of documentation that users see."""
    if isinstance(default, type) and issubclass(default, BaseModel):
        return Field(default_factory=default, description=text, **limits)
    return Field(default, description=text, **limits)
