"""Dialogues written out with `\\n\\nHuman:` and `\\n\\nAssistant:`, as in Anthropic's hh-rlhf."""

from __future__ import annotations

import re

from rlhf.data.templates import Messages

_MARK = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_NAMES = {role: name for name, role in _ROLES.items()}


def parse_dialogue(text: str) -> Messages | None:
    """The turns of a dialogue that ends where the assistant answers; None: the text is none.

    `write_dialogue` gives exactly the text again. What stands before the first mark is a system
    message.
    """
    before, *rest = _MARK.split(text)
    names, contents = rest[::2], rest[1::2]
    alternate = [("Human", "Assistant")[i % 2] for i in range(len(names))]
    if not names or names != alternate or names[-1] != "Assistant" or contents[-1] != "":
        return None
    if not all(content.startswith(" ") for content in contents[:-1]):
        return None
    turns = [
        {"role": _ROLES[name], "content": content[1:]}
        for name, content in zip(names[:-1], contents[:-1], strict=True)
    ]
    return [{"role": "system", "content": before}, *turns] if before else turns


def write_dialogue(messages: Messages) -> str:
    """The text of `parse_dialogue`'s turns."""
    said = [
        one["content"]
        if one["role"] == "system"
        else f"\n\n{_NAMES[one['role']]}: {one['content']}"
        for one in messages
    ]
    return "".join(said) + "\n\nAssistant:"
