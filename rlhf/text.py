"""Text compared as a reader would compare it. Imports nothing of ours."""

from __future__ import annotations

import unicodedata


def normalised(text: str) -> str:
    """The form in which two prompts count as the same prompt.

    Unicode NFKC, case folded, every run of white space one space, no white space at the ends.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
