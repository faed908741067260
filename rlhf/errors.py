"""Errors that a user can cause. Each says the value, the rule and
the remedy, and has an exit code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """Shown as its message alone, without a traceback."""

    exit_code = 1


class StepFailed(UserError):
    """A step's processes ended without a verified artifact."""

    exit_code = 1


class Diverged(UserError):
    """Numbers are no longer finite, or the policy has left the reference for good.

    tensors: name -> tensor of the rows where it happened, if known.
    """

    exit_code = 1

    def __init__(self, message: str, tensors: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.tensors = dict(tensors or {})


class ConfigError(UserError):
    """Bad usage or configuration."""

    exit_code = 2


class RequirementError(UserError):
    """Something needed is missing: an artifact, a port, the hub, disk space, a package."""

    exit_code = 3


class DataError(RequirementError):
    """The data cannot be used: absent, empty, or with too many bad rows."""


class ArtifactError(RequirementError):
    """An artifact is absent, partial, corrupt or does not fit."""
