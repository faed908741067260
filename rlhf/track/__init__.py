"""Metrics and progress: metrics.jsonl always, other trackers by name, a bar or lines."""

from rlhf.track.forward import TRACKERS, TrackerWarning, require_packages, tracker_names
from rlhf.track.metrics import read_metrics
from rlhf.track.progress import Progress, progress
from rlhf.track.tracker import Tracker, open_tracker

__all__ = [
    "TRACKERS",
    "Progress",
    "Tracker",
    "TrackerWarning",
    "open_tracker",
    "progress",
    "read_metrics",
    "require_packages",
    "tracker_names",
]
