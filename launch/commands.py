"""Subcommands of `rlhf` and `python train.py`: all that is not making a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def _certify(argv: Sequence[str]) -> int:
    from launch import certify

    return certify.main(argv)


def _doctor(argv: Sequence[str]) -> int:
    from launch import doctor

    return doctor.main(argv)


def _evaluate(argv: Sequence[str]) -> int:
    from launch import evaluation

    return evaluation.main(argv)


def _example(argv: Sequence[str]) -> int:
    from launch import examples

    return examples.main(argv)


def _plan(argv: Sequence[str]) -> int:
    from launch import plan_command

    return plan_command.main(argv)


def _serve_reward(argv: Sequence[str]) -> int:
    from launch import serve_reward

    return serve_reward.main(argv)


# first word of the command line -> what it runs, with the words after it; returns the exit code
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "certify": _certify,
    "doctor": _doctor,
    "evaluate": _evaluate,
    "example": _example,
    "plan": _plan,
    "serve-reward": _serve_reward,
}
