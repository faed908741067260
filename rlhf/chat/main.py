"""The process that `rlhf chat` starts: reads the models, then talks."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf.errors import UserError
from rlhf.redact import printable, redact

if TYPE_CHECKING:
    from rlhf.chat.session import Session


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 where a message from a pipe could not be followed; an error's own; 130
    for Ctrl-C at the prompt."""
    flags = parser().parse_args(argv)
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with _libraries_on_stderr():
            session = prepare(flags)
        session.run()
        return 1 if session.refusals and not sys.stdin.isatty() else 0
    except UserError as error:
        print(printable(redact(f"error: {error}")), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    add = made.add_argument
    add("--speaker", nargs=3, action="append", required=True, metavar=("NAME", "MODEL", "TOKENS"))
    add("--trust-remote-code", action="append", default=[], metavar="NAME")
    add("--rollout", nargs=2, action="append", default=[], metavar=("NAME", "JSON"))
    add("--note", action="append", default=[])
    add("--reward", default="")
    add("--max-new-tokens", type=int)
    add("--temperature", type=float)
    add("--seed", type=int)
    return made


def prepare(flags: argparse.Namespace) -> Session:
    """The session, its models loaded; says what they are."""
    import torch
    import transformers

    from rlhf.chat.scorer import Scorer
    from rlhf.chat.session import Session
    from rlhf.chat.speaker import load_speaker, sampling_line

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for note in dict.fromkeys(flags.note):
        say("note", note)
    speakers = []
    rollouts = {name: json.loads(settings) for name, settings in flags.rollout}
    for name, place, tokenizer in flags.speaker:
        speaker = load_speaker(
            name,
            place,
            tokenizer,
            trusted=name in flags.trust_remote_code,
            max_new_tokens=flags.max_new_tokens,
            temperature=flags.temperature,
            rollout=rollouts.get(name),
        )
        speakers.append(speaker)
        say(name, place)
        say("", sampling_line(speaker))
        if not speaker.has_template:
            say("", "no chat template: it goes on with your text, each message by itself")
    scorer = Scorer(flags.reward, bool(flags.trust_remote_code))
    say("commands", "/score /reset /help /quit")
    seeds = random.Random(flags.seed)
    turn = {"seed": 0, "number": 0}

    def before_answer() -> None:
        """All speakers answer a message with the same random numbers."""
        if turn["number"] % len(speakers) == 0:
            turn["seed"] = seeds.getrandbits(62)
        turn["number"] += 1
        torch.manual_seed(turn["seed"])

    return Session(speakers, scorer.score, before_answer, read_line)


def read_line(prompt: str) -> str | None:
    """The next line without its end; None at the end. What comes from a pipe is shown."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if line:
            shown = line.rstrip("\n").encode("utf-8", "backslashreplace").decode()
            print(prompt + printable(shown), flush=True)
        return line.rstrip("\n") if line else None
    try:
        return input(prompt)
    except EOFError:
        print()
        return None


def say(name: str, text: str) -> None:
    """A line about what is loaded, past the libraries' own output."""
    line = printable(redact(f"{name:9}{text}")) + "\n"
    os.write(_console, line.encode("utf-8", "backslashreplace"))


_console = 1


@contextlib.contextmanager
def _libraries_on_stderr() -> Iterator[None]:
    """Libraries print what they like, from their import on; stdout has our lines alone."""
    global _console
    sys.stdout.flush()
    _console = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(_console, 1)
        os.close(_console)
        _console = 1


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # the line can be edited, earlier ones come back
    sys.exit(main())
