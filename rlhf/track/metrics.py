"""metrics.jsonl: one JSON object per line, whatever other trackers there are."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import RequirementError
from rlhf.store import jsonable
from rlhf.store.files import open_own

NAME = "metrics.jsonl"
RESERVED = ("step", "time", "seconds")
_NON_FINITE = {text: float(text) for text in ("NaN", "Infinity", "-Infinity")}


class MetricsFile:
    """Appends lines `{"step", "time", "seconds", **metrics}`; each is on the disk's way at once.

    `time` is the Unix time, `seconds` counts from this object's start, after a resume from where
    it had come. NaN and infinities are stored as the texts NaN, Infinity, -Infinity, so every line
    is valid JSON. A part of a line that a killed process left is cut off, and so is what was logged
    after the checkpoint that a resumed run goes on from (`keep_bytes`: the length that it noted).
    Raises RequirementError if the file cannot be opened.
    """

    def __init__(self, step_dir: Path, keep_bytes: int | None = None) -> None:
        self.path = step_dir / NAME
        try:
            step_dir.mkdir(parents=True, exist_ok=True)
            self._stream = open_own(self.path, "a+b")  # closed in close()
            if keep_bytes is not None and keep_bytes < self.length:
                self._stream.truncate(keep_bytes)
            _cut_partial_line(self._stream)
            self._start = time.monotonic() - _last_seconds(self.path)
        except OSError as error:
            raise RequirementError(
                f"{self.path}: cannot be written ({error.strerror}); "
                "make the directory writable, or choose another --output-dir"
            ) from error

    @property
    def length(self) -> int:
        """Bytes written so far, whole lines."""
        return os.fstat(self._stream.fileno()).st_size

    def write(self, metrics: Mapping[str, Any], step: int) -> None:
        """Raises ValueError for a metric with a reserved name, OSError if the disk refuses; then
        the file ends with the last whole line."""
        if clash := [name for name in RESERVED if name in metrics]:
            raise ValueError(f"metric {clash[0]!r}: the names {', '.join(RESERVED)} are taken")
        line = {
            "step": step,
            "time": round(time.time(), 3),
            "seconds": round(time.monotonic() - self._start, 3),
            **metrics,
        }
        data = (json.dumps(jsonable(line), allow_nan=False) + "\n").encode("ascii")
        before = os.fstat(self._stream.fileno()).st_size
        try:
            if self._stream.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            self._stream.truncate(before)
            raise

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, NaN and infinities as floats again; [] if there is no file.

    A last line without its end (the run is being killed, or is writing now) is left out. After a
    resume a step can occur twice: the later line counts. Raises RequirementError for any other
    line that is no JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            row = json.loads(line)
            rows.append({key: _number(value) for key, value in row.items()})
        except (ValueError, AttributeError, RecursionError) as error:
            raise RequirementError(
                f"{path}:{number}: not a line of metrics ({error}); delete that line"
            ) from error
    return rows


def _last_seconds(path: Path) -> float:
    """Where the time had come in the file's last line; 0 for a new file."""
    rows = path.read_bytes().splitlines()
    try:
        return float(json.loads(rows[-1])["seconds"]) if rows else 0.0
    except (ValueError, KeyError, TypeError):
        return 0.0  # a line that read_metrics will name


def _number(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _cut_partial_line(stream: Any) -> None:
    """Truncates to the last newline, looking back in pieces."""
    end = stream.seek(0, os.SEEK_END)
    position = end
    while position > 0:
        start = max(0, position - 4096)
        stream.seek(start)
        newline = stream.read(position - start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position < end:
        stream.truncate(position)
