"""`rlhf.text`: which prompts count as the same."""

from __future__ import annotations

import pytest

from rlhf.text import normalised


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is it?", "  what is  IT?\n"),
        ("Stra\u00dfe", "STRASSE"),
        ("\ufb01lm", "film"),
        ("a\u00a0b\r\n\tc", "a b c"),
    ],
)
def test_the_same_prompt(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(("one", "other"), [("a b", "ab"), ("it?", "it"), ("resume", "résumé")])
def test_other_prompts(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)
