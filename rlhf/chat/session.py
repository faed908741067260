"""The conversation: what is typed, what is shown. Knows no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.redact import printable

if TYPE_CHECKING:
    from rlhf.chat.speaker import Answer, Speaker

YOU = "you"
HELP = (
    "/score: the reward model's opinion of the last answer; /reset: a new conversation; /quit\n"
    "A line that ends with \\ goes on in the next one; // begins a message with a slash."
)


class Session:
    """Reads messages, has every speaker answer, and shows it.

    Everything that a model writes is shown as text: what would steer the terminal is escaped, and
    an answer's later lines are indented, so that none looks like another's words.
    """

    def __init__(
        self,
        speakers: Sequence[Speaker],
        opinion: Callable[[Speaker, Answer], Any],
        before_answer: Callable[[], None],
        read: Callable[[str], str | None],
    ) -> None:
        """`opinion` scores, `before_answer` is called before each one (seeds), `read` gives the
        next line for a prompt, None at the end."""
        self.speakers = speakers
        self._opinion, self._before_answer, self._read = opinion, before_answer, read
        self._width = max(len(YOU), *(len(one.name) for one in speakers))
        self.refusals = 0
        """How many messages and commands could not be followed."""

    def run(self) -> None:
        """Until /quit or the end of the input."""
        while (said := self._message()) is not None:
            if said == "/quit":
                return
            try:
                self._follow(said)
            except UserError as error:
                self.refusals += 1
                self._say(f"error: {error}")

    def _message(self) -> str | None:
        """The next message: a line, or several with backslashes at their ends."""
        lines: list[str] = []
        while (line := self._read(self._label("." * len(YOU) if lines else YOU))) is not None:
            more = line.endswith("\\")
            lines.append(line[:-1] if more else line)
            if not more:
                break
        return "\n".join(lines) if lines else None

    def _follow(self, said: str) -> None:
        if any("\ud800" <= char <= "\udfff" for char in said):
            raise UserError("this line is not UTF-8 text; it was not given to the model")
        command = said.strip()
        if command.startswith("/") and not command.startswith("//"):
            return self._command(command)
        if not command:
            return None
        return self._answer(said[1:] if command.startswith("//") else said)

    def _command(self, command: str) -> None:
        if command == "/score":
            return self._score()
        if command == "/reset":
            for speaker in self.speakers:
                speaker.reset()
            return self._say("a new conversation")
        if command == "/help":
            return self._say(HELP)
        raise UserError(f"{command.split()[0]}: no such command. {HELP}")

    def _answer(self, said: str) -> None:
        for speaker in self.speakers:
            self._before_answer()
            shown = Shown(self._label(speaker.name))
            try:
                answer = speaker.answer(said, shown)
            finally:
                shown.end()
            if answer.end:
                self._say(f"[{answer.end}]")
            if answer.dropped:
                self._say(f"[{answer.dropped} earlier messages had no room and are forgotten]")

    def _score(self) -> None:
        if all(one.last is None for one in self.speakers):
            raise UserError("/score: nothing has been answered yet")
        for one in self.speakers:
            if one.last is not None:
                name = f"{one.name}: " if len(self.speakers) > 1 else ""
                self._say(f"{name}{self._opinion(one, one.last).line()}")

    def _label(self, name: str) -> str:
        return f"{name}>".ljust(self._width + 2)

    def _say(self, text: str) -> None:
        """A line of our own, indented as answers are."""
        indent = " " * (self._width + 2)
        print("\n".join(indent + printable(line) for line in text.splitlines()), flush=True)


class Shown:
    """An answer on the screen, as it grows."""

    def __init__(self, label: str) -> None:
        self._indent, self._began, self._ended = " " * len(label), False, False
        sys.stdout.write(printable(label))
        sys.stdout.flush()

    def __call__(self, piece: str) -> None:
        if not self._began:  # the space after "Assistant:" is the template's matter
            piece = piece.lstrip()
            self._began = bool(piece)
        sys.stdout.write(printable(piece).replace("\n", "\n" + self._indent))
        sys.stdout.flush()

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            print("" if self._began else "[nothing]", flush=True)
