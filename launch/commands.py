"""Subcommands of `rlhf` and `python train.py`: all that is not making a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlhf.config.keys import nearest
from rlhf.errors import ConfigError


def _certify(argv: Sequence[str]) -> int:
    from launch import certify

    return certify.main(argv)


def _chat(argv: Sequence[str]) -> int:
    from launch import chat

    return chat.main(argv)


def _compare(argv: Sequence[str]) -> int:
    from launch import compare

    return compare.main(argv)


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


def _recipes(argv: Sequence[str]) -> int:
    from launch import recipes_command

    return recipes_command.main(argv)


def _show(argv: Sequence[str]) -> int:
    from launch import show

    return show.main(argv)


def _serve_reward(argv: Sequence[str]) -> int:
    from launch import serve_reward

    return serve_reward.main(argv)


# first word of the command line -> what it runs, with the words after it; returns the exit code
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "certify": _certify,
    "chat": _chat,
    "compare": _compare,
    "doctor": _doctor,
    "evaluate": _evaluate,
    "example": _example,
    "plan": _plan,
    "recipes": _recipes,
    "serve-reward": _serve_reward,
    "show": _show,
}

TRAIN = "train"
# what a verb is for -> verb -> what it does, as --help lists them
GROUPS: dict[str, dict[str, str]] = {
    "make a run": {
        TRAIN: "SFT, reward model and PPO: what happens without a verb",
        "recipes": "list, describe and copy recipes",
        "evaluate": "evaluate a policy again: another judge, more prompts, other data",
    },
    "look at it": {
        "show": "where a run stands, its curves, time, memory and verdict",
        "compare": "settings and figures of several runs, with intervals",
        "chat": "talk to a run's models, an artifact or a hub id",
        "serve-reward": "offer a reward model over HTTP",
    },
    "before a run": {
        "plan": "does it fit, how long does it take; for other machines too",
        "doctor": "every check of this machine and the hosts",
        "example": "a job for Kubernetes or LSF",
        "certify": "do the algorithms reach optima that can be computed",
    },
}


def overview() -> str:
    """All verbs, grouped, a line each."""
    lines = []
    for title, verbs in GROUPS.items():
        lines.append(f"{title}:")
        lines += [f"  {verb:12} {text}" for verb, text in verbs.items()]
    return "\n".join(lines)


def dispatch(argv: Sequence[str]) -> tuple[Callable[[Sequence[str]], int] | None, list[str]]:
    """(the verb, None to train; the words after it). Raises ConfigError for no such verb."""
    words = list(argv)
    if not words or words[0].startswith("-") or "=" in words[0]:
        return None, words
    verb, *rest = words
    if verb == TRAIN:
        return None, rest
    if verb in COMMANDS:
        return COMMANDS[verb], rest
    close = nearest(verb, [TRAIN, *COMMANDS])
    hint = f" Did you mean {close[0]}?" if close else ""
    known = ", ".join(verb for verbs in GROUPS.values() for verb in verbs)
    raise ConfigError(f"{verb}: no such verb.{hint} There are {known}; `rlhf --help` tells more")
