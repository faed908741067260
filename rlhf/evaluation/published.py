"""The verdict on what a run has published."""

from __future__ import annotations

from typing import Any

from rlhf.errors import RequirementError
from rlhf.store import RunDir, find_evaluation, read_json


def verdict_of(run: RunDir) -> dict[str, Any]:
    """The content of its verdict.json. Raises RequirementError: there is no policy, no verdict on
    this policy, or nothing was held out."""
    found, why = find_evaluation(run)
    path = run.artifact("evaluation") / "verdict.json"
    if found is None or not path.exists():
        raise RequirementError(
            f"{run.path}: no verdict: {why or 'nothing was held out'}. Evaluate it with: "
            f"python train.py evaluate {run.path}"
        )
    return dict(read_json(path))
