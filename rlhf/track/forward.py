"""Other trackers by name, through accelerate's classes, without accelerate's engine or state."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.schema import TrackConfig
from rlhf.errors import ConfigError, RequirementError
from rlhf.redact import redact_tree

_FAILURES = 3


@dataclass(frozen=True)
class Place:
    """What a tracker may want to know about the run."""

    step_dir: Path
    step: int
    project: str
    done: int = 0
    """Optimiser steps that are logged already, before a resume."""

    @property
    def run_name(self) -> str:
        return f"{self.step_dir.absolute().parent.name}-step{self.step}"


@dataclass(frozen=True)
class TrackerKind:
    """`package`: what `pip install` calls it; `arguments`: for accelerate's class of that name."""

    module: str
    package: str
    arguments: Callable[[Place], dict[str, Any]]


TRACKERS: dict[str, TrackerKind] = {
    "tensorboard": TrackerKind(
        "tensorboard",
        "tensorboard",
        lambda place: {
            "run_name": "tensorboard",
            "logging_dir": place.step_dir,
            **({"purge_step": place.done + 1} if place.done else {}),
        },
    ),
    # One aim repository for the steps of a run: `aim up --repo output/NAME`.
    "aim": TrackerKind(
        "aim",
        "aim",
        lambda place: {
            "run_name": place.run_name,
            "logging_dir": str(place.step_dir.absolute().parent),
            "experiment": place.project,
            "capture_terminal_logs": False,
            "system_tracking_interval": None,
        },
    ),
    "wandb": TrackerKind(
        "wandb",
        "wandb",
        lambda place: {
            "run_name": place.project,
            "name": place.run_name,
            "dir": str(place.step_dir),
        },
    ),
    "mlflow": TrackerKind(
        "mlflow",
        "mlflow",
        lambda place: {"experiment_name": place.project, "run_name": place.run_name},
    ),
    "comet_ml": TrackerKind("comet_ml", "comet_ml", lambda place: {"run_name": place.project}),
    "clearml": TrackerKind(
        "clearml",
        "clearml",
        lambda place: {"run_name": place.project, "task_name": place.run_name},
    ),
    "swanlab": TrackerKind(
        "swanlab",
        "swanlab",
        lambda place: {
            "run_name": place.project,
            "experiment_name": place.run_name,
            "logdir": str(place.step_dir / "swanlab"),
        },
    ),
    "trackio": TrackerKind(
        "trackio", "trackio", lambda place: {"run_name": place.project, "name": place.run_name}
    ),
}


def tracker_names(track: TrackConfig) -> list[str]:
    """The trackers to forward to; `auto` becomes tensorboard or nothing. Imports none of them.

    Raises ConfigError for an unknown name (with the choices). Does not look for packages.
    """
    if track.trackers == "auto":
        return ["tensorboard"] if _installed("tensorboard") else []
    for name in track.trackers:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"track.trackers {name!r}: one of {', '.join(TRACKERS)} (or auto) is needed{hint}"
            )
    return list(dict.fromkeys(track.trackers))


def require_packages(names: list[str]) -> None:
    """Raises RequirementError, with the pip command, if a tracker's package is missing."""
    if missing := [name for name in names if not _installed(TRACKERS[name].module)]:
        packages = " ".join(TRACKERS[name].package for name in missing)
        raise RequirementError(
            f"track.trackers {missing[0]!r}: its package is not installed: "
            f"pip install {packages}, or leave it out of track.trackers"
        )


class Forward:
    """One tracker of accelerate's. Whatever goes wrong in it: one warning, and training goes on."""

    def __init__(self, name: str, place: Place, config: Mapping[str, Any]) -> None:
        self.name = name
        self._failures = 0
        self._warned = False
        self._tracker: Any = None
        self._guard(lambda: self._start(place, config))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if self._tracker is not None and self._failures < _FAILURES:
            self._guard(lambda: self._tracker.log(dict(metrics), step=step))

    def finish(self) -> None:
        if self._tracker is not None:
            self._guard(lambda: self._tracker.finish())

    def _start(self, place: Place, config: Mapping[str, Any]) -> None:
        tracker = _accelerate_class(self.name)(**TRACKERS[self.name].arguments(place))
        # Only rank 0 comes here. accelerate would find that out by making a PartialState, which
        # can start a process group of its own and sets thread counts.
        tracker.main_process_only = False
        tracker.start()
        self._tracker = tracker
        tracker.store_init_configuration(redact_tree(flatten(config)))

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  any library may fail here; training goes on
            self._failures += 1
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"tracker {self.name} failed: {type(error).__name__}: {error}. Training goes "
                    f"on, metrics.jsonl has everything; after {_FAILURES} failures in a row the "
                    "tracker is left alone",
                    TrackerWarning,
                    stacklevel=4,
                )
        else:
            self._failures = 0


class TrackerWarning(UserWarning):
    """A tracker failed; nothing else did."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as `a.b.c` -> bool, int, float or text, which is what trackers take."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


class _Log(logging.LoggerAdapter):
    """A plain logger with the one method more that accelerate's trackers call."""

    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        self.warning(*args, **kwargs)


def _accelerate_class(name: str) -> Any:
    from accelerate import tracking

    # accelerate's logger refuses to work without a PartialState (see above); a plain one does not.
    tracking.logger = _Log(logging.getLogger("accelerate.tracking"), {})
    return tracking.LOGGER_TYPE_TO_CLASS[name]


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
