"""One PPO iteration with and without a saving, in turn: `python -m benchmarks.ablation --help`.

Both sides are one process with the same weights and answers. Prints CPU time, the side without over
the one with it: of the whole iteration, and of each phase.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.pairs import as_launched, print_line
from benchmarks.workload import OurPPO, Workload

PHASES = ("rollout", "score", "update")


@contextmanager
def without(name: str, ours: OurPPO) -> Iterator[None]:
    """Inside, an iteration does without it."""
    if name == "first-critic-step":
        with patch.object(ours, "reads_apart", True):
            yield
    elif name == "needed":
        with patch("rlhf.models.causal.only_needed", lambda *_: nullcontext()):
            yield
    else:
        with patch("rlhf.models.attention.KEPT", 0):
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--without", choices=["first-critic-step", "needed", "kept-weights"], required=True
    )
    parser.add_argument("--model", choices=["6m", "135m"], default="6m")
    parser.add_argument("--rows", type=int, default=16, help="prompts per iteration")
    parser.add_argument("--micro-tokens", type=int, help="step3.micro_batch_tokens")
    parser.add_argument("--early", action="store_true", help="mean answer 24 tokens, not 64")
    parser.add_argument("--pairs", type=int, default=10)
    args = parser.parse_args()
    as_launched()
    torch.set_num_threads(1)
    ours = OurPPO(
        Workload(
            model=args.model,
            rows=args.rows,
            micro=args.rows,
            micro_tokens=args.micro_tokens,
            early=args.early,
        )
    )
    ours.iteration()
    sides: tuple[list[dict[str, float]], ...] = ([], [])
    for turn in range(args.pairs):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            ours.sampler.generator.manual_seed(turn)  # the same answers on both sides
            with nullcontext() if side else without(args.without, ours):
                sides[side].append(seconds(ours))
    ratios = {
        name: [a[name] / b[name] for a, b in zip(*sides, strict=True)] for name in sides[0][0]
    }
    result: dict[str, Any] = {
        "pairs": args.pairs,
        "median_ratio": round(statistics.median(ratios["all"]), 3),
        "spread": [round(min(ratios["all"]), 3), round(max(ratios["all"]), 3)],
        "by_phase": {name: round(statistics.median(ratios[name]), 3) for name in PHASES},
        "cpu_seconds": {
            side: {name: round(statistics.median(r[name] for r in runs), 3) for name in runs[0]}
            for side, runs in zip(("without", "with"), sides, strict=True)
        },
    }
    print_line("ablation", vars(args), result)


def seconds(ours: OurPPO) -> dict[str, float]:
    stats = ours.iteration()
    found = {name: stats[f"cpu_{name}"] for name in PHASES}
    return found | {"all": sum(found.values())}


if __name__ == "__main__":
    main()
