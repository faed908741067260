"""One example as plain text, the same for every step: `Sample`, and the rules that make it.

What a row's columns mean is found before (`rlhf.data.shapes`); here conversations are rendered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jinja2

from rlhf.config.schema import DataConfig
from rlhf.data import placeholders
from rlhf.data.dialogue import parse_dialogue
from rlhf.data.shapes import ANSWERS, Example, Shape
from rlhf.data.shapes.table import number
from rlhf.data.shapes.turns import extras
from rlhf.data.sources.base import BadRow, sha256
from rlhf.data.split import prompt_key
from rlhf.data.templates import Messages
from rlhf.data.typed import GUARD, unguarded
from rlhf.errors import ConfigError

__all__ = ["ANSWERS", "Render", "Sample", "SampleMaker", "need_template"]

_GUARD_IN_JSON = json.dumps(GUARD).strip('"')


class Render(Protocol):
    """The chat template: turns to text; `generate` ends it where the assistant's answer begins."""

    def __call__(self, messages: Messages, generate: bool, tools: Any = None, /) -> str: ...


@dataclass(frozen=True)
class Sample:
    """A prompt and the answers the row has for it. `where` is the row's place. `key` hashes its
    content, `prompt_key` its prompt (`rlhf.data.split.prompt_key`), both before rendering (so that
    no template, tokenizer or step changes them). `lacks`: why an answer is not there, where that is
    known. `source`: the turns of a conversation, None of a text that no template wrote. `columns`:
    what the row has in those of data.keep_columns."""

    prompt: str
    response: str | None
    chosen: str | None
    rejected: str | None
    margin: float | None
    where: str
    key: str = ""
    prompt_key: str = ""
    lacks: str | None = None
    source: Example | None = None
    columns: dict[str, Any] = field(default_factory=dict)


class SampleMaker:
    """Examples to samples by the formats of a DataConfig and the template.

    `template` is the text of the template that `render` applies. Raises ConfigError: malformed
    format.
    """

    def __init__(self, data: DataConfig, render: Render, template: str) -> None:
        self._render = render
        self._turns = data.plain_prompts == "turns"
        self._template = template
        self._response_format = placeholders.parse(data.response_format, "response_format")
        if placeholders.fields(self._response_format) != ["text"]:
            raise ConfigError(
                f"data.response_format {data.response_format!r}: needs {{text}}, once, and no "
                "other name"
            )

    def __call__(self, example: Example, where: str) -> Sample:
        """Make a sample. Raises BadRow with the reason, and ConfigError where the template cannot
        say what the conversation says; which answers are needed is not asked."""
        margin = _number(example.margin)
        key = _content_key(example, margin)
        typed = _as_typed(example.prompt)
        if self._turns:
            example = _as_turns(example)
        prompt, answers = self._texts(example)
        if not prompt.strip():
            raise BadRow("the prompt is empty")
        for text in (prompt, *answers.values()):
            _check_text(text or "")
        return Sample(
            prompt=prompt,
            margin=margin,
            where=where,
            key=key,
            prompt_key=prompt_key(typed),
            lacks=example.lacks,
            source=None if isinstance(example.prompt, str) else example,
            response=answers.get("response"),
            chosen=answers.get("chosen"),
            rejected=answers.get("rejected"),
        )

    def with_prompt(self, sample: Sample, messages: Messages) -> Sample:
        """The same conversation with another beginning. Raises BadRow."""
        assert sample.source is not None
        source = replace(sample.source, prompt=messages)
        prompt, answers = self._texts(source)
        return replace(
            sample,
            prompt=prompt,
            source=source,
            response=answers.get("response"),
            chosen=answers.get("chosen"),
            rejected=answers.get("rejected"),
        )

    def assistant_turns(self, sample: Sample, name: str, eos: str) -> list[tuple[str, str]]:
        """Of each assistant turn of prompt and answer: the text since the one before, and its own.

        All of it in order is the rendered conversation (without what follows the last turn's eos),
        and each turn's text stands after exactly what the template writes before it when it is
        asked to generate that turn. Raises BadRow where the template writes turns differently once
        others follow, and ConfigError where it does not end turns with the eos token.
        """
        source = sample.source
        assert source is not None
        answer = source.answers[name]
        assert isinstance(source.prompt, list)
        assert isinstance(answer, list)
        turns, found, done = [*source.prompt, *answer], [], ""
        try:
            for number, turn in enumerate(turns):
                if turn["role"] != "assistant":
                    continue
                before = self._render(turns[:number], True, source.tools)
                after = self._render(turns[: number + 1], False, source.tools)
                if not before.startswith(done) or not after.startswith(before):
                    raise BadRow(
                        "data.multi_turn=all: the template writes a turn differently once others "
                        "follow (it may strip reasoning); data.multi_turn=last trains the last"
                    )
                text = after[len(before) :]
                place = _end_of(text, eos)
                if place < 0 and number < len(turns) - 1:
                    raise ConfigError(
                        "data.multi_turn=all: the chat template does not end an assistant turn "
                        f"with the eos token {eos!r}, so earlier turns would never learn to end; "
                        "use one that does (data.template=chatml or model), or "
                        "data.multi_turn=last"
                    )
                found.append((before[len(done) :], text[:place] if place >= 0 else text))
                done = before + (text[: place + len(eos)] if place >= 0 else text)
        except jinja2.TemplateError as error:
            raise BadRow(f"refused by the template: {error}") from error
        return found

    def notes(self, shape: Shape) -> list[str]:
        """What the template leaves out of such rows. Raises ConfigError: tools, tool calls."""
        return need_template(self._template, shape.extras)

    def _texts(self, example: Example) -> tuple[str, dict[str, str]]:
        prompt = example.prompt
        if not isinstance(prompt, str):
            return self._conversation(prompt, example.answers, example.tools)
        texts = {name: text for name, text in example.answers.items() if isinstance(text, str)}
        return prompt, {
            name: placeholders.fill(self._response_format, {"text": text}) if text else text
            for name, text in texts.items()
        }

    def _conversation(
        self, prompt: Messages, answers: Mapping[str, str | Messages], tools: list[Any] | None
    ) -> tuple[str, dict[str, str]]:
        """Rendered prompt, and of each answer what the template adds to it."""
        try:
            need_template(self._template, extras(prompt) | ({"tools"} if tools else set()))
            text = self._render(prompt, True, tools)
            _check_all_said(prompt, text)
            found: dict[str, str] = {}
            for name, value in answers.items():
                if isinstance(value, str):  # an empty answer
                    found[name] = value
                    continue
                need_template(self._template, extras(value))
                whole = self._render([*prompt, *value], False, tools)
                if not whole.startswith(text):
                    raise BadRow("the template renders the prompt differently with an answer")
                found[name] = whole[len(text) :]
        except jinja2.TemplateError as error:
            raise BadRow(f"refused by the template: {error}") from error
        return text, found


def need_template(template: str, needs: set[str] | frozenset[str]) -> list[str]:
    """Whether a template's text speaks of what conversations have; notes on what it leaves out.

    needs: as `Shape.extras`. Raises ConfigError for tools and tool calls that it does not know:
    without them the conversation means something else.
    """
    for name in ("tool_calls", "tools"):
        if name in needs and name not in template:
            without = ": data.ignore_columns=[tools]" if name == "tools" else ""
            raise ConfigError(
                f"the conversations have {name}, which the chat template does not know: it would "
                "leave them out. Use a template that does (data.template=model, if the model's own "
                f"is one), or make the data without them{without}"
            )
    if "reasoning_content" in needs and "reasoning_content" not in template:
        return ["reasoning_content of the messages is not used: the chat template does not know it"]
    return []


def _check_all_said(messages: Messages, text: str) -> None:
    """A template without a branch for a role would leave the message out in silence."""
    for one in messages:
        if one["role"] in ("system", "user", "tool") and one["content"].strip() not in text:
            if one["role"] == "tool" and json.dumps(one["content"])[1:-1] in text:
                continue
            raise BadRow(f"the template leaves out a message of role {one['role']!r}")


def _number(value: Any) -> float | None:
    """A finite number, from text too; None: there is none."""
    try:
        return number(value, "margin")
    except BadRow:
        return None


def _content_key(example: Example, margin: float | None) -> str:
    """Hash of what the row says; of plain rows the same as ever, as the split follows it."""
    content = {"prompt": example.prompt, "messages": None, **dict.fromkeys(ANSWERS)}
    content.update(example.answers)
    if example.tools:
        content["tools"] = example.tools
    try:
        found = json.dumps([content, margin], sort_keys=True, default=str)
        # Without the marks of one tokenizer's special tokens (typed.py), as JSON escapes them.
        return sha256(found.replace(_GUARD_IN_JSON, ""))
    except RecursionError as error:
        raise BadRow("nested too deeply") from error


def _as_typed(prompt: str | Messages) -> str | Messages:
    """Without one tokenizer's marks."""
    if isinstance(prompt, str):
        return unguarded(prompt)
    return [{**one, "content": unguarded(one["content"])} for one in prompt]


def _as_turns(example: Example) -> Example:
    """Text as turns: a dialogue by its marks, other text as one user turn."""
    if not isinstance(example.prompt, str):
        return example
    dialogue = parse_dialogue(example.prompt)
    answers: dict[str, str | Messages] = {}
    for name, text in example.answers.items():
        if isinstance(text, str) and text:
            said = text.removeprefix(" ") if dialogue else text
            answers[name] = [{"role": "assistant", "content": said}]
        else:
            answers[name] = text
    turns = dialogue or [{"role": "user", "content": example.prompt}]
    return replace(example, prompt=turns, answers=answers)


def _end_of(text: str, eos: str) -> int:
    """Where the first eos is that a template wrote and nobody typed (typed.py); -1: nowhere."""
    place = text.find(eos)
    while place > 0 and text[place - 1] == GUARD:
        place = text.find(eos, place + 1)
    return place


def _check_text(text: str) -> None:
    if "\0" in text:
        raise BadRow("NUL byte")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("not UTF-8") from error
