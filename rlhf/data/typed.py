"""Special tokens that somebody typed are text; only a template's or a format's are special.

Row texts are marked before anything is rendered around them: GUARD stands before each special
token that occurs in them. The Encoder reads such a token as the characters it is spelt with, and
leaves GUARD out. What a template or format adds has no GUARD, and becomes the special token.
"""

from __future__ import annotations

import re
from typing import Any

from rlhf.data.sources.base import BadRow

GUARD = "\ufdd0"  # a Unicode noncharacter: reserved for a program's own use, never for exchange


def unguarded(text: str) -> str:
    """The text as it was typed."""
    return text.replace(GUARD, "")


class SpecialTokens:
    """A tokenizer's special tokens, found in text."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.values()
        names = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, names), key=lambda name: (-len(name), name))
        self.ids: dict[str, int] = {
            name: int(tokenizer.convert_tokens_to_ids(name)) for name in longest_first
        }
        self._any = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._ours = re.compile(f"(?<!{GUARD})({self._any.pattern})")

    def guard(self, value: Any) -> Any:
        """A row's value with every special token in its texts marked as typed.

        Raises BadRow for a text that has GUARD itself.
        """
        if isinstance(value, str):
            if GUARD in value:
                raise BadRow("the Unicode noncharacter U+FDD0")
            return self.mark(value)
        if isinstance(value, dict):
            return {name: self.guard(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self.guard(part) for part in value]
        return value

    def mark(self, text: str) -> str:
        """A part of a marked text, marked again: a cut may have gone between mark and token."""
        return self._any.sub(lambda found: GUARD + found.group(), unguarded(text))

    def pieces(self, text: str) -> list[str]:
        """The text cut at the special tokens that nobody typed: text, token, text, token, text."""
        return self._ours.split(text)
