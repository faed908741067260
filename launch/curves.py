"""Curves from metrics.jsonl, as numbers and as a line of characters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.track.metrics import RESERVED

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN = "_.-:=+*#"  # for a console without the blocks
NOT_FINITE = "?"
POINTS = 500
Curve = list[tuple[int, float]]


def curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Metric -> its (step, value) in the order of steps. A step that was logged again after a
    resume counts once, with its later value."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in RESERVED and isinstance(value, (int, float)):
                found.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in found.items()}


def thinned(curve: Curve, most: int = POINTS) -> Curve:
    """At most `most` of the points, evenly spread, the first and the last among them."""
    if len(curve) <= most:
        return curve
    return [curve[round(i * (len(curve) - 1) / (most - 1))] for i in range(most)]


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """One character for each value or, beyond `width`, for the mean of each of `width` equal
    parts; the lowest block is the smallest of them. A part with a value that is not finite is `?`.
    """
    count = min(width, len(values))
    parts = [
        values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)
    ]
    means = [statistics.fmean(part) for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return NOT_FINITE * count
    low, span = min(finite), max(finite) - min(finite)
    top = len(blocks) - 1
    return "".join(
        blocks[round((mean - low) / span * top) if span else top // 2]
        if math.isfinite(mean)
        else NOT_FINITE
        for mean in means
    )
