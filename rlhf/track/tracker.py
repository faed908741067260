"""What a step logs to: one object, silent on every rank but 0."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config.schema import TrackConfig
from rlhf.store.files import room_remedy
from rlhf.track.forward import Forward, Place, TrackerWarning, require_packages, tracker_names
from rlhf.track.metrics import MetricsFile


class Tracker:
    """Writes metrics.jsonl and forwards to other trackers. A context manager; silent if empty."""

    def __init__(self, file: MetricsFile | None = None, forwards: Sequence[Forward] = ()) -> None:
        self._file = file
        self._forwards = list(forwards)
        self._warned = False

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Logs numbers under optimiser step (or iteration) `step`; one line, flushed.

        Values are floats, ints or one-element tensors. Never raises for a tracker or a disk that
        fails (one warning); raises ValueError or TypeError for metrics that are not numbers or
        are named step, time or seconds.
        """
        if self._file is None:
            return
        numbers = {name: _scalar(name, value) for name, value in metrics.items()}
        try:
            self._file.write(numbers, step)
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self._file.path}: cannot be written ({error.strerror}): this step's "
                    f"metrics are lost; {room_remedy(self._file.path)}. Training goes on",
                    TrackerWarning,
                    stacklevel=2,
                )
        for forward in self._forwards:
            forward.log(numbers, step)

    @property
    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl; 0 on other ranks than 0."""
        return self._file.length if self._file is not None else 0

    def close(self) -> None:
        """Ends all trackers; a second call does nothing."""
        forwards, self._forwards = self._forwards, []
        for forward in forwards:
            forward.finish()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tracker(
    track: TrackConfig,
    step_dir: Path | str,
    *,
    step: int,
    rank: int,
    config: Mapping[str, Any],
    keep_bytes: int | None = None,
    done: int = 0,
) -> Tracker:
    """The tracker of pipeline step `step` (1, 2, 3); `config` is stored with each tracker's run.

    After a resume, `keep_bytes` of metrics.jsonl are kept, and trackers that can (tensorboard) drop
    what they have beyond `done` optimiser steps. Raises, before anything is written: ConfigError
    (unknown tracker, on every rank), RequirementError (package missing, or step_dir not writable;
    rank 0).
    """
    names = tracker_names(track)
    if rank != 0:
        return Tracker()
    require_packages(names)
    place = Place(Path(step_dir), step, track.project, done)
    file = MetricsFile(place.step_dir, keep_bytes)
    return Tracker(file, [Forward(name, place, config) for name in names])


def _scalar(name: str, value: Any) -> int | float:
    number = value.item() if hasattr(value, "item") else value
    if not isinstance(number, (int, float)):
        raise TypeError(f"metric {name!r} is {value!r:.60}: a number is needed")
    return number
