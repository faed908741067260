"""Errors that a user can cause. Each says the value, the rule and
the remedy, and has an exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Shown as its message alone, without a traceback."""

    exit_code = 1


class StepFailed(UserError):
    """A step's processes ended without a verified artifact."""

    exit_code = 1


class EvaluationFailed(UserError):
    """There is a published policy, and no verdict on it."""

    exit_code = 1


class Diverged(UserError):
    """Numbers are no longer finite, or the policy has left the reference for good.

    tensors: name -> tensor of the rows where it happened, if known.
    """

    exit_code = 1

    def __init__(self, message: str, tensors: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.tensors = dict(tensors or {})


class Corrupted(UserError):
    """Weights in memory, or what a processor computes from them, are not what they must be."""

    exit_code = 1


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


@contextmanager
def at_its_end(calls: Iterable[Callable[[], None]]) -> Iterator[None]:
    """Makes the calls when the body is over; where that has failed already, a failure among them is
    a note to its error."""
    failed: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failed = error
        raise
    finally:
        for call in calls:
            try:
                call()
            except Exception as error:
                if failed is None:
                    raise
                note = f"and at its end: {type(error).__name__}: {error}"
                # What add_note does; Python 3.10 has none.
                vars(failed)["__notes__"] = [*getattr(failed, "__notes__", ()), note]


def with_notes(error: BaseException) -> str:
    """Its message, and its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])
