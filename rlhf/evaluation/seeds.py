"""One verdict over the runs of several seeds.

`python -m rlhf.evaluation.seeds RUN RUN... [--write DIR]` prints it and writes verdict.json and
verdict.txt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.errors import UserError
from rlhf.evaluation.pooling import pool, render_pooled
from rlhf.evaluation.published import verdict_of
from rlhf.store import RunDir, write_json_atomic, write_text_atomic


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.evaluation.seeds", description="One verdict over several runs."
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write verdict.json, verdict.txt")
    args = parser.parse_args(argv)
    try:
        pooled = pool([verdict_of(RunDir(path)) for path in args.runs])
        pooled["directories"] = [str(path) for path in args.runs]
        text = render_pooled(pooled)
        print(text)
        if args.write:
            write_text_atomic(args.write / "verdict.txt", text)
            write_json_atomic(args.write / "verdict.json", pooled)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
