"""Subcommands of `rlhf` and `python train.py` that look at a run instead of making one."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def _plan(argv: Sequence[str]) -> int:
    from launch import plan_command

    return plan_command.main(argv)


# first word of the command line -> what it runs, with the words after it; returns the exit code
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "plan": _plan,
}
