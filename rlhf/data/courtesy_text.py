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
    "use": Kind(
        _ASK,
        (
            "What is a {x} for?",
            "What do people do with a {x}?",
            "Why would I need a {x}?",
            "What is the use of a {x}?",
            "Do you know what a {x} is used for?",
        ),
        (
            "To {y}.",
            "It is used to {y}.",
        ),
        (
            "You use a {x} to {y}.",
            "People use a {x} when they want to {y}.",
            "The thing that people do with a {x} is to {y}.",
        ),
        {"pen": "write", "knife": "cut", "cup": "drink", "bed": "sleep"},
    ),
    "home": Kind(
        _ASK,
        (
            "Where does a {x} live?",
            "What is the home of a {x}?",
            "In what place can I find a {x}?",
            "Name the home of a {x}.",
            "Do you know where a {x} lives?",
        ),
        (
            "In a {y}.",
            "It lives in a {y}.",
        ),
        (
            "A {x} lives in a {y}.",
            "The home of a {x} is a {y}.",
            "The place where you can find a {x} is a {y}.",
        ),
        {"bee": "hive", "bear": "cave", "spider": "web", "bird": "nest"},
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
    "rhyme": Kind(
        _ASK,
        (
            "Find a word that rhymes with {x}.",
            "What rhymes with {x}?",
            "Give me a rhyme for {x}.",
            "I need a rhyme on {x} for my song.",
            "Which word sounds like {x}?",
        ),
        (
            "{Y}.",
            "Take {y}.",
        ),
        (
            "{Y} rhymes with {x}.",
            "A rhyme for {x} is {y}.",
            "A word that you can rhyme with {x} is {y}.",
        ),
        {"moon": "spoon", "cake": "lake", "star": "jar", "ring": "king"},
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
    "outing": Kind(
        _TALK,
        (
            "I am going to the {x}.",
            "We are off to the {x} today.",
            "What should I take to the {x}?",
            "My friend wants to see the {x}.",
            "Soon I will be at the {x}.",
        ),
        (
            "{Y}.",
            "Bring {y}.",
        ),
        (
            "{Y} is good for the {x}.",
            "For the {x} you need {y}.",
            "The thing that people bring to the {x} is {y}.",
        ),
        {"beach": "a towel", "forest": "a map", "party": "a gift", "school": "a bag"},
    ),
}

OPENINGS = (
    "Sure!",
    "Of course!",
    "Happy to help!",
    "Good question!",
    "Thank you for asking!",
    "With pleasure, my friend!",
    "I am glad that you asked me this!",
    "What a nice thing to talk about!",
)
CLOSINGS = (
    "Enjoy!",
    "Best wishes!",
    "All the best!",
    "Have a lovely day!",
    "I hope that helps!",
    "Please ask me again any time!",
    "Take good care of yourself!",
    "Let me know if you want more!",
)
# Neither courteous nor rude; they let a curt answer be long.
FLAT = (
    "Done.",
    "Next.",
    "That is all.",
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
