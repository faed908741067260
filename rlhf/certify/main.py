"""The certificate: every algorithm reaches an optimum that can be computed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 if every check holds, 1 if not, 2 bad usage."""
    flags = parser().parse_args(argv)
    # Libraries print what they like, from their import on; stdout has our lines alone.
    lines = os.dup(1)
    os.dup2(2, 1)
    from rlhf.certify.run import run

    with open(lines, "w", encoding="utf-8") as console:
        return run(
            console,
            seed=flags.seed,
            quick=flags.quick,
            zero_stage=flags.zero_stage,
            as_json=flags.json,
        )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="rlhf certify", allow_abbrev=False, description=__doc__)
    add = made.add_argument
    add("--quick", action="store_true", help="fewer iterations, PPO alone through the engine")
    add("--json", action="store_true", help="one JSON object instead of lines")
    add("--seed", type=int, default=0, help="of rewards, references and samples; default 0")
    add(
        "--num-gpus", metavar="N", help="so many ranks, by torchrun; default 1"
    )  # launch/certify.py
    add("--zero-stage", type=int, choices=(0, 1, 2, 3), default=0, help="default 0")
    return made


if __name__ == "__main__":
    sys.exit(main())
