"""How much data a run takes at most: what is larger is refused in one line that names the limit."""

from __future__ import annotations

from rlhf.config.base import Positive, Section, doc


class LimitsConfig(Section):
    file_gb: float = doc(20.0, "GB of one file at most, as downloaded and as unpacked.", gt=0)
    whole_gb: float = doc(
        2.0,
        "GB at most of a file that must be read whole: `.json`, and compressed parquet or arrow.",
        gt=0,
    )
    row_mb: float = doc(64.0, "MB of one line or field at most (jsonl, csv).", gt=0)
    rows: Positive = doc(5_000_000, "Rows at most, of all files together.")
