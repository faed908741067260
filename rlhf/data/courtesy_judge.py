"""A rule-based judge of answers to the sample data's prompts; it knows the templates.

Three points, each given or not: the right fact, courtesy, a whole answer that ended. Whatever a
policy writes gets a score; a prompt that is not the sample data's gets no point for its fact.
An answer in words that the templates do not have can earn the first two points, not the third.
"""

from __future__ import annotations

import re
from functools import cache

from rlhf.data.courtesy_text import (
    CLOSINGS,
    FLAT,
    KINDS,
    OPENINGS,
    RUDE,
    RUDE_WORDS,
    Question,
    fill,
    questions,
)

FULL_SCORE = 3.0

_SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+$")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_NEGATIONS = {"not", "no", "never", "isn't", "nor", "neither", "without", "unless"}
_RUDE = re.compile(r"\b(?:" + "|".join(re.escape(word) for word in RUDE_WORDS) + r")\b", re.I)
_ENTITIES = {entity.lower() for kind in KINDS.values() for entity in kind.facts}
_FACTS = {fact.split()[-1].lower() for kind in KINDS.values() for fact in kind.facts.values()}


def judge(prompt: str, answer: str, ended: bool) -> float:
    """Points from 0 to FULL_SCORE for the answer's text (without prompt and end token).

    1 for the right fact: named exactly once, in a text that names no other fact or entity of the
    templates and does not negate it. 1 for courtesy: begins with one courteous opening, ends with
    one courteous closing, with something between them and no rude word anywhere. 1 for a whole
    answer: `ended` (it stopped by itself) and it is a sequence of the templates' own sentences in
    their order, with at most one statement.
    """
    sentences = [s.strip() for s in _SENTENCE.findall(answer) if s.strip()]
    points = [
        _right_fact(prompt, sentences),
        _courteous(sentences),
        ended and _whole(answer, sentences),
    ]
    return float(sum(points))


def _right_fact(prompt: str, sentences: list[str]) -> bool:
    question = _by_prompt().get(prompt)
    if question is None:
        return False
    said = [s for s in sentences if s not in _MANNERS]
    words = [w.lower() for s in said for w in _WORD.findall(s)]
    facts = [w for w in words if w in _FACTS]
    entities = {w for w in words if w in _ENTITIES}
    return (
        facts == [question.fact.split()[-1].lower()]
        and entities <= {question.entity.lower()}
        and not _NEGATIONS & set(words)
    )


def _courteous(sentences: list[str]) -> bool:
    return (
        len(sentences) >= 3
        and sentences[0] in OPENINGS
        and sentences[-1] in CLOSINGS
        and not any(s in OPENINGS or s in CLOSINGS for s in sentences[1:-1])
        and not any(_RUDE.search(s) for s in sentences)
    )


def _whole(answer: str, sentences: list[str]) -> bool:
    """Opening? remark? statement? (closing | flat | remark)?, something said, nothing else."""
    if answer != " " + " ".join(sentences):
        return False
    parts = "".join(_part(s) for s in sentences)
    manners = [s for s in sentences if s in _MANNERS]
    fits = re.fullmatch(r"osc|sf?|rs?r?", parts) is not None
    return fits and len(set(manners)) == len(manners)


def _part(sentence: str) -> str:
    for letter, known in zip("ocfr", (OPENINGS, CLOSINGS, FLAT, RUDE), strict=True):
        if sentence in known:
            return letter
    return "s" if sentence in _statements() else "?"


_MANNERS = frozenset(OPENINGS + CLOSINGS + FLAT + RUDE)


@cache
def _by_prompt() -> dict[str, Question]:
    return {q.prompt: q for q in questions()}


@cache
def _statements() -> frozenset[str]:
    """Every statement that the templates can make, true or not: facts have a point of their own."""
    return frozenset(
        fill(statement, entity, fact)
        for kind in KINDS.values()
        for statement in kind.terse + kind.statements
        for entity in kind.facts
        for fact in kind.facts.values()
    )
