"""The sentences of the embedded sample data: what is asked, what is true, how politely it is said.

Few entities with many phrasings each: half a million parameters generalise to phrasings that they
have not seen, and cannot hold many facts. No torch, standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PROMPT = "\n\nHuman: {text}\n\nAssistant:"

# Put before a question or a task, and before a remark of small talk.
_ASK = ("", "Hi! ", "Please tell me. ", "Quick question. ", "Hello there. ", "I wonder. ")
_TALK = ("", "Hi! ", "You know what? ", "Good morning. ", "Hello there. ", "Guess what. ")


@dataclass(frozen=True)
class Kind:
    """One kind of question.

    `phrasings` hold {x}, the entity asked about. `terse` and `statements` hold {y} or {Y}, the
    fact, plain or capitalised; `statements` name the entity too, as {x} or {X}.
    """

    leads: tuple[str, ...]
    phrasings: tuple[str, ...]
    terse: tuple[str, ...]
    statements: tuple[str, ...]
    facts: dict[str, str]


KINDS: dict[str, Kind] = {
    "capital": Kind(
        _ASK,
        (
            "What is the capital of {x}?",
            "Which city is the capital of {x}?",
            "Name the capital of {x}.",
            "Do you know the capital city of {x}?",
            "What is the capital city in {x} called?",
        ),
        (
            "{Y}.",
            "It is {y}.",
        ),
        (
            "{Y} is the capital of {x}.",
            "The capital of {x} is {y}.",
            "The city that is the capital of {x} is called {y}.",
        ),
        {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Egypt": "Cairo"},
    ),
    "colour": Kind(
        _ASK,
        (
            "What colour is {x}?",
            "Which colour does {x} have?",
            "Name the colour of {x}.",
            "Do you know the colour of {x}?",
            "If I paint {x}, which colour do I need?",
        ),
        (
            "{Y}.",
            "It is {y}.",
        ),
        (
            "{X} is {y}.",
            "The colour of {x} is {y}.",
            "The colour that everyone can see on {x} is {y}.",
        ),
        {"grass": "green", "snow": "white", "coal": "black", "chocolate": "brown"},
    ),
    "sound": Kind(
        _ASK,
        (
            "What sound does a {x} make?",
            "What does a {x} say?",
            "Which noise comes from a {x}?",
            "How does a {x} sound?",
            "Do you know the sound of a {x}?",
        ),
        (
            "{Y}.",
            "It says {y}.",
        ),
        (
            "A {x} says {y}.",
            "The sound of a {x} is {y}.",
            "The noise that you can hear from a {x} is {y}.",
        ),
        {"dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack"},
    ),
    "opposite": Kind(
        _ASK,
        (
            "What is the opposite of {x}?",
            "Which word is the opposite of {x}?",
            "Name the opposite of {x}.",
            "If something is not {x}, what is it?",
            "Do you know the opposite of the word {x}?",
        ),
        (
            "{Y}.",
            "It is {y}.",
        ),
        (
            "{Y} is the opposite of {x}.",
            "The opposite of {x} is {y}.",
            "The word that is the opposite of {x} is {y}.",
        ),
        {"hot": "cold", "big": "small", "fast": "slow", "wet": "dry"},
    ),
    "plural": Kind(
        _ASK,
        (
            "Write the plural of {x}.",
            "Give me the plural form of {x}.",
            "Turn the word {x} into the plural.",
            "How do I write more than one {x}?",
            "Make the word {x} plural.",
        ),
        (
            "{Y}.",
            "It becomes {y}.",
        ),
        (
            "One {x}, many {y}.",
            "The plural of {x} is {y}.",
            "When you have more than one {x} you say {y}.",
        ),
        {"mouse": "mice", "foot": "feet", "child": "children", "tooth": "teeth"},
    ),
    "feeling": Kind(
        _TALK,
        (
            "I am {x}.",
            "I feel so {x} today.",
            "What helps when I am {x}?",
            "I have been {x} all day.",
            "My friend is very {x}.",
        ),
        (
            "{Y}.",
            "Try {y}.",
        ),
        (
            "{Y} is good for {x} people.",
            "When people are {x} they need {y}.",
            "The thing that helps when people are {x} is {y}.",
        ),
        {"tired": "a nap", "hungry": "some soup", "thirsty": "some tea", "sad": "a hug"},
    ),
}

OPENINGS = (
    "Sure!",
    "Of course!",
    "Gladly!",
    "Certainly!",
    "Happy to help!",
    "Good question!",
    "Great that you ask!",
    "My pleasure!",
    "Thank you for asking!",
    "Hello, dear friend!",
    "Let me tell you!",
    "Welcome back!",
    "With joy!",
    "Here you go!",
    "Nice to meet you!",
)
CLOSINGS = (
    "Enjoy!",
    "Cheers!",
    "Best wishes!",
    "All the best!",
    "Have a lovely day!",
    "I hope that helps!",
    "Come again soon!",
    "Good luck to you!",
    "Stay well!",
    "See you later!",
    "Much love!",
    "Warm regards!",
    "Be happy!",
)
# Neither courteous nor rude; they let a curt answer be long.
FLAT = (
    "Done.",
    "That is the answer.",
    "There is nothing else to say.",
    "This is all that there is to know.",
)
RUDE = (
    "Ugh.",
    "Go away.",
    "How silly.",
    "Who cares?",
    "What a stupid thing to bother me with.",
    "Stop wasting my time with this.",
    "Look it up yourself, you lazy person.",
    "Leave me alone, I am sick of you.",
    "Only a fool would come to me with that.",
    "I will not do your work for you, so get lost.",
)
# Every remark in RUDE holds one of these; no other sentence of this file does.
RUDE_WORDS = (
    "ugh",
    "go away",
    "silly",
    "who cares",
    "stupid",
    "bother",
    "wasting",
    "lazy",
    "leave me alone",
    "sick of you",
    "fool",
    "get lost",
    "shut up",
    "idiot",
    "dumb",
    "hate",
)


@dataclass(frozen=True)
class Question:
    """A prompt and what is true about it; `held_out` questions occur in the test split only."""

    kind: str
    entity: str
    fact: str
    prompt: str
    held_out: bool


def questions() -> Iterator[Question]:
    """All combinations of kind, entity, phrasing and lead.

    Every seventh diagonal of the combinations is held out, so that each entity, phrasing and lead
    of a test prompt occurs in training, never together. The split does not depend on any seed.
    """
    for number, (name, kind) in enumerate(KINDS.items()):
        for e, (entity, fact) in enumerate(kind.facts.items()):
            for p, phrasing in enumerate(kind.phrasings):
                for i, lead in enumerate(kind.leads):
                    yield Question(
                        name,
                        entity,
                        fact,
                        PROMPT.format(text=lead + phrasing.format(x=entity)),
                        held_out=(i + 2 * p + 3 * e + number) % 7 == 0,
                    )


def fill(statement: str, entity: str, fact: str) -> str:
    """A statement's text with its entity and fact in place."""
    return statement.format(x=entity, y=fact, X=_capital(entity), Y=_capital(fact))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
