"""What the driver says of a finished step: figures that were measured, and no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launch.execute import describe_result
from rlhf.stages import get

ROWS = {"held_out": {"rows": 8, "prompts": 8, "seen": 0}}
NO_ROWS = {"held_out": {"rows": 0, "prompts": 0, "seen": 0}}


@pytest.mark.parametrize(
    ("step", "metrics", "said"),
    [
        (1, {"perplexity": 1.61732, "perplexity_before": 310.2751} | ROWS,
         ", held-out perplexity 1.617 (before training 310.3)"),
        (1, {"perplexity": "Infinity"} | ROWS, ", held-out perplexity inf"),
        (2, {"accuracy": 0.0, "accuracy_before": 0.5} | ROWS,
         ", held-out accuracy 0 (before training 0.5)"),
        (2, {"score_mean": 0.1} | NO_ROWS, ", not measured (no held-out rows)"),
        (1, {}, ""),
        (3, {"gain": 1.0}, ""),
    ],
)  # fmt: skip
def test_figures(step: int, metrics: dict[str, Any], said: str) -> None:
    manifest = SimpleNamespace(id="ab" * 32, metrics=metrics)
    outcome = SimpleNamespace(seconds=61.4, code=0)
    text = describe_result(SimpleNamespace(stage=get(step)), manifest, outcome)  # type: ignore[arg-type]
    assert text.startswith(f"step {step} done: ")
    assert text.endswith(f"abababababab, 61 s{said}")
