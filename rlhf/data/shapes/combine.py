"""A prompt and its answers, each text or turns, brought into the one form of an `Example`.

The rules are trl's (https://huggingface.co/docs/trl/dataset_formats): explicit and implicit
prompts, plain and conversational rows, answers with or without the prompt before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf.data.shapes.base import Context, Example, Values
from rlhf.data.shapes.cells import is_messages
from rlhf.data.shapes.turns import is_turn, turns
from rlhf.data.sources.base import BadRow
from rlhf.data.templates import Messages

TURN = "\n\nAssistant:"
_NESTED = ("full_text", "post", "article", "text")  # where a question is an object: its text
Text = str | Messages


def prompt_of(values: Values, context: Context) -> Text | None:
    """The prompt from `prompt`, `input` and `system`; None where the row has none.

    Text stays text where the context says so; else it becomes a user's turn.
    """
    value = values.get("prompt")
    if isinstance(value, dict) and not is_turn(value):
        value = next((value[key] for key in _NESTED if isinstance(value.get(key), str)), value)
    if value is None:
        return None
    system, addition = _text(values, "system", context), _text(values, "input", context)
    if is_messages(value) or isinstance(value, list):
        if addition:
            raise BadRow(f"column {context.name('input')!r} beside a conversation")
        return with_system(turns(value, context.name("prompt")), system)
    if not isinstance(value, str):
        raise wrong_type(context.name("prompt"), value)
    text = f"{value}\n{addition}" if addition else value
    if not text.strip():
        raise BadRow(f"column {context.name('prompt')!r} is empty")
    if not context.plain or (system and not text.rstrip().endswith("Assistant:")):
        return with_system([{"role": "user", "content": text}], system)
    return system + text


def with_system(messages: Messages, system: str) -> Messages:
    """The turns with a system message first. BadRow: they have another one already."""
    if not system:
        return messages
    if messages[0]["role"] == "system":
        if messages[0]["content"] == system:
            return messages
        raise BadRow("a system column beside a system message that says something else")
    return [{"role": "system", "content": system}, *messages]


def answer_of(values: Values, slot: str, context: Context) -> Text | None:
    """One answer: text, turns, or None. Raises BadRow for every other type."""
    return as_answer(values.get(slot), context.name(slot))


def as_answer(value: Any, column: str) -> Text | None:
    """A value as an answer: text, turns, or None. Raises BadRow for every other type."""
    if value is None or isinstance(value, str):
        return value
    if is_messages(value):
        return turns(value, column)
    raise wrong_type(column, value)


def combine(
    prompt: Text | None,
    answers: dict[str, Text | None],
    context: Context,
    *,
    margin: Any = None,
    tools: Any = None,
) -> Example:
    """One form for both. Raises BadRow where prompt and answers do not fit together."""
    given = {name: value for name, value in answers.items() if value is not None}
    lists = [value for value in given.values() if isinstance(value, list)]
    if prompt is None:
        prompt, given = _implicit(given, context)
    elif isinstance(prompt, str) and lists:
        prompt = _turns_for(prompt, given, context)
    if isinstance(prompt, str):
        return Example(prompt, given, margin, tools)
    found = {name: _after(prompt, value, context.name(name)) for name, value in given.items()}
    return Example(prompt, found, margin, tools)


def repeats(one: Example) -> bool | None:
    """Whether all answers begin with the prompt's text; None: it says nothing (too short, no text).

    A prompt of one or two words ("Hi") begins many an answer by chance.
    """
    texts = [value for value in one.answers.values() if isinstance(value, str) and value]
    if not isinstance(one.prompt, str) or not texts or len(one.prompt.split()) < 3:
        return None
    return all(text.startswith(one.prompt) for text in texts)


def without_prompt(one: Example) -> Example:
    """The example with the prompt's text taken off the answers that begin with it."""
    if not isinstance(prompt := one.prompt, str):
        return one
    answers = {
        name: text.removeprefix(prompt) if isinstance(text, str) else text
        for name, text in one.answers.items()
    }
    return replace(one, answers=answers)


def _turns_for(prompt: str, answers: dict[str, Text], context: Context) -> Messages:
    """The turns that a prompt given as text means beside answers that are turns."""
    wholes = [v for v in answers.values() if isinstance(v, list) and v[0]["role"] != "assistant"]
    if not wholes:
        return [{"role": "user", "content": prompt}]
    size = min(_beginning(one) for one in wholes)
    if len(wholes) > 1:
        size = min(size, *(_alike(wholes[0], other) for other in wholes[1:]))
    start = wholes[0][:size]
    said = {one["content"].strip() for one in start if one["role"] == "user"}
    if prompt.strip() not in said:
        raise BadRow(
            f"column {context.name('prompt')!r} is no user turn with which the answers' "
            "conversations begin"
        )
    return start


def _beginning(whole: Messages) -> int:
    """How many turns come before the last run of assistant turns."""
    size = len(whole)
    while size and whole[size - 1]["role"] == "assistant":
        size -= 1
    return size


def _after(prompt: Messages, answer: Text, column: str) -> Text:
    """The turns of an answer after those of the prompt."""
    if answer == "":
        return answer
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    rest = answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer
    if not rest or rest[-1]["role"] != "assistant":
        raise BadRow(f"column {column!r}: the conversation does not end with the assistant")
    if rest[0]["role"] not in ("assistant", "tool"):
        raise BadRow(f"column {column!r}: a whole conversation that does not begin with the prompt")
    return rest


def _implicit(answers: dict[str, Text], context: Context) -> tuple[Text, dict[str, Text]]:
    """The prompt is what chosen and rejected begin with; both keep what follows."""
    chosen, rejected = answers.get("chosen"), answers.get("rejected")
    if chosen is None or rejected is None:
        raise BadRow(f"column {context.name('prompt')!r} is missing")
    prompt: Text
    if isinstance(chosen, list) and isinstance(rejected, list):
        size = _alike(chosen, rejected)
        prompt = chosen[:size]
    elif isinstance(chosen, str) and isinstance(rejected, str):
        size = _prompt_size(chosen[: _alike(chosen, rejected)])
        prompt = chosen[:size]
    else:
        raise BadRow("chosen and rejected are not of one type")
    if size == 0:
        raise BadRow("no prompt, and chosen and rejected do not begin alike")
    return prompt, {**answers, "chosen": chosen[size:], "rejected": rejected[size:]}


def _alike(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items (characters, messages) two sequences have in common at their beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _prompt_size(common: str) -> int:
    """Length of the prompt in the common beginning of two dialogues: up to the last assistant turn
    (Anthropic/hh-rlhf), else up to the last space, so that no word is cut."""
    turn = common.rfind(TURN)
    if turn >= 0:
        return turn + len(TURN)
    cut = max(common.rfind(" "), common.rfind("\n"))
    return max(cut, 0)


def _text(values: Values, slot: str, context: Context) -> str:
    value = values.get(slot)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise wrong_type(context.name(slot), value)
    return value if value.strip() else ""


def wrong_type(column: str, value: Any) -> BadRow:
    """The reason for a value that is neither text nor turns."""
    kind = "an empty list" if value == [] else type(value).__name__
    return BadRow(f"column {column!r} is {kind}, not text")
