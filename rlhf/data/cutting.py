"""Prompts over the limit: whole turns go, the oldest first; the system message stays."""

from __future__ import annotations

import bisect
from collections.abc import Callable

from rlhf.data.templates import Messages

TURNS, INSIDE, LEFT = (
    "prompt: oldest turns left out",
    "prompt: its last user turn cut on the left",
    "prompt: text cut on the left",
)


def shortened(
    messages: Messages, fits: Callable[[Messages], bool], tidy: Callable[[str], str]
) -> tuple[Messages, str] | None:
    """The turns that are kept of a conversation that does not fit, and the kind of the cut.

    Kept are the leading system messages and as many of the latest turns as fit, beginning with a
    user's: a tool's result never stands without its call. If the last user turn and what follows
    it do not fit, that turn's text is cut on the left; `tidy` is applied to what is left of it.
    None: not even that helps. What is returned was tried with `fits`.
    """
    system, rest = _parts(messages)
    starts = [i for i, one in enumerate(rest) if one["role"] == "user"]
    if not starts:
        return None
    later = [i for i in starts if i > 0]
    first = bisect.bisect_left(later, True, key=lambda i: fits([*system, *rest[i:]]))
    if first < len(later) and fits(kept := [*system, *rest[later[first] :]]):
        return kept, TURNS
    user, *after = rest[starts[-1] :]

    def ending(size: int) -> Messages:
        text = user["content"][len(user["content"]) - size :]
        return [*system, {**user, "content": tidy(text)}, *after]

    most, size = len(user["content"]) - 1, 1
    while size < most and fits(ending(size)):  # a text of a megabyte is not tokenised whole
        size *= 2
    sizes = range(1, min(size, most) + 1)
    place = bisect.bisect_left(sizes, True, key=lambda size: not fits(ending(size)))
    if place and fits(kept := ending(sizes[place - 1])):
        return kept, INSIDE
    return None


def last_exchange(messages: Messages) -> Messages:
    """The leading system messages, and the last user turn with what follows it."""
    system, rest = _parts(messages)
    starts = [i for i, one in enumerate(rest) if one["role"] == "user"]
    return [*system, *rest[starts[-1] :]] if starts else messages


def _parts(messages: Messages) -> tuple[Messages, Messages]:
    """(leading system messages, the others)."""
    size = next((i for i, one in enumerate(messages) if one["role"] != "system"), len(messages))
    return messages[:size], messages[size:]
