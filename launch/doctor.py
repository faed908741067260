"""`rlhf doctor`, with train.py's flags: every check of this machine and the hosts, a line each."""

from __future__ import annotations

from collections.abc import Sequence

from launch.checklist import ask_all
from launch.options import parse_options
from launch.plan import make_plan
from rlhf.redact import redact


def main(argv: Sequence[str]) -> int:
    """Prints all checks; 0 if none failed, else the error's exit code, as a run would end."""
    found = ask_all(make_plan(parse_options(argv)), "doctor")
    for check in found.checks:
        print(redact(check.line()))
    failed = sum(check.state == "FAIL" for check in found.checks)
    ending = f"{failed} failed" if failed else "all hold"
    print(f"{len(found.checks)} checks, {ending}")
    return found.error.exit_code if found.error else 0
