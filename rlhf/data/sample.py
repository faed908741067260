"""One row as plain text, the same for every step: `Sample`, and the rules that make it.

The rules are trl's dataset formats (https://huggingface.co/docs/trl/dataset_formats): explicit and
implicit prompts, plain and conversational rows.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from rlhf.config.schema import DataConfig
from rlhf.data.sources.base import BadRow, Row, sha256
from rlhf.data.split import prompt_key
from rlhf.data.templates import Messages
from rlhf.errors import ConfigError

ANSWERS = ("response", "chosen", "rejected")
_COLUMNS = ("prompt", *ANSWERS, "messages", "margin")
_TURN = "\n\nAssistant:"
Render = Callable[[Messages, bool], str]


@dataclass(frozen=True)
class Sample:
    """A prompt and the answers the row has for it. `where` is the row's place. `key` hashes its
    content, `prompt_key` its prompt (`rlhf.data.split.prompt_key`), both before rendering (so that
    no template, tokenizer or step changes them)."""

    prompt: str
    response: str | None
    chosen: str | None
    rejected: str | None
    margin: float | None
    where: str
    key: str = ""
    prompt_key: str = ""


class SampleMaker:
    """Rows to samples by the column mapping, the formats and the template of a DataConfig.

    `render(messages, generate)` is the template. Raises ConfigError: malformed format, unknown
    name in data.columns.
    """

    def __init__(self, data: DataConfig, render: Render) -> None:
        unknown = sorted(set(data.columns) - set(_COLUMNS))
        if unknown:
            raise ConfigError(
                f"data.columns: {', '.join(unknown)} unknown; ours are {', '.join(_COLUMNS)}"
            )
        self._columns = {name: data.columns.get(name, name) for name in _COLUMNS}
        self._render = render
        self._prompt_format = data.prompt_format and _parse(data.prompt_format, "prompt_format")
        self._response_format = _parse(data.response_format, "response_format")
        if [field for _, field in self._response_format if field] != ["text"]:
            raise ConfigError(
                f"data.response_format {data.response_format!r}: needs {{text}}, once, and no "
                "other name"
            )

    def __call__(self, row: Row, where: str) -> Sample:
        """Make a sample. Raises BadRow with the reason; which answers are needed is not asked."""
        values = {name: row.get(column) for name, column in self._columns.items()}
        if self._prompt_format:
            values["prompt"] = _fill(self._prompt_format, row)
        margin = self._margin(values.pop("margin"))
        key = _content_key([values, margin])
        asked, prompt, answers = self._texts(values)
        if not prompt.strip():
            raise BadRow(f"column {self._columns['prompt']!r} is empty")
        for text in (prompt, *answers.values()):
            _check_text(text or "")
        wrapped = {name: answers.get(name) for name in ANSWERS}
        return Sample(
            prompt=prompt, margin=margin, where=where, key=key, prompt_key=asked, **wrapped
        )

    def _margin(self, value: Any) -> float | None:
        if value is None:
            return None
        try:
            margin = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            margin = math.nan
        if not math.isfinite(margin):
            raise BadRow(f"column {self._columns['margin']!r} is not a number")
        return margin

    def _texts(self, values: dict[str, Any]) -> tuple[str, str, dict[str, str | None]]:
        """The prompt's key, the prompt and the answers as text."""
        prompt, answers = values["prompt"], {name: values[name] for name in ANSWERS}
        if prompt is None and values["messages"] is not None:
            turns = self._messages(values["messages"], "messages")
            prompt = turns[:-1] if turns[-1]["role"] == "assistant" else turns
            if len(prompt) < len(turns):
                answers["response"] = turns[-1:]
        if prompt is None and answers["chosen"] is not None and answers["rejected"] is not None:
            prompt, answers = self._implicit(answers)
        if prompt is None:
            raise BadRow(f"column {self._columns['prompt']!r} is missing")
        if isinstance(prompt, list):
            turns = self._messages(prompt, "prompt")
            return prompt_key(turns), *self._conversation(turns, answers)
        if not isinstance(prompt, str):
            raise self._wrong_type("prompt", prompt)
        plain = {name: self._plain(name, value) for name, value in answers.items()}
        return prompt_key(prompt), prompt, plain

    def _plain(self, name: str, value: Any) -> str | None:
        if value is None or value == "":
            return value
        if not isinstance(value, str):
            raise self._wrong_type(name, value)
        return _fill(self._response_format, {"text": value})

    def _conversation(
        self, prompt: Messages, answers: dict[str, Any]
    ) -> tuple[str, dict[str, str | None]]:
        """Rendered prompt, and of each answer what the template adds to it."""
        try:
            text = self._render(prompt, True)
            found: dict[str, str | None] = {}
            for name, value in answers.items():
                if isinstance(value, list):
                    whole = self._render([*prompt, *self._messages(value, name)], False)
                    if not whole.startswith(text):
                        raise BadRow("the template renders the prompt differently with an answer")
                    found[name] = whole[len(text) :]
                else:
                    found[name] = self._plain(name, value)
        except jinja2.TemplateError as error:
            raise BadRow(f"refused by the template: {error}") from error
        return text, found

    def _implicit(self, answers: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The prompt is what chosen and rejected begin with; both keep what follows."""
        chosen, rejected = answers["chosen"], answers["rejected"]
        if isinstance(chosen, list) and isinstance(rejected, list):
            size = _alike(chosen, rejected)
        elif isinstance(chosen, str) and isinstance(rejected, str):
            size = _prompt_size(chosen[: _alike(chosen, rejected)])
        else:
            raise BadRow("chosen and rejected are not of one type")
        if size == 0:
            raise BadRow("no prompt, and chosen and rejected do not begin alike")
        rest = {"chosen": chosen[size:], "rejected": rejected[size:]}
        return chosen[:size], {**answers, **rest}

    def _messages(self, value: Any, name: str) -> Messages:
        if not isinstance(value, list) or not value:
            raise self._wrong_type(name, value)
        for message in value:
            if not isinstance(message, dict) or not all(
                isinstance(message.get(part), str) for part in ("role", "content")
            ):
                raise BadRow(f"column {self._columns[name]!r}: a message lacks role or content")
        return [{"role": one["role"], "content": one["content"]} for one in value]

    def _wrong_type(self, name: str, value: Any) -> BadRow:
        kind = "an empty list" if value == [] else type(value).__name__
        return BadRow(f"column {self._columns[name]!r} is {kind}, not text")


def _alike(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items (characters, messages) two sequences have in common at their beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _prompt_size(common: str) -> int:
    """Length of the prompt in the common beginning of two dialogues: up to the last assistant turn
    (Anthropic/hh-rlhf), else up to the last space, so that no word is cut."""
    turn = common.rfind(_TURN)
    if turn >= 0:
        return turn + len(_TURN)
    cut = max(common.rfind(" "), common.rfind("\n"))
    return max(cut, 0)


def _content_key(content: Any) -> str:
    try:
        return sha256(json.dumps(content, sort_keys=True, default=str))
    except RecursionError as error:
        raise BadRow("nested too deeply") from error


def _check_text(text: str) -> None:
    if "\0" in text:
        raise BadRow("NUL byte")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("not UTF-8") from error


def _parse(text: str, setting: str) -> list[tuple[str, str | None]]:
    """(literal, field) pairs of a format text; only plain `{name}` fields are allowed."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"data.{setting} {text!r}: {error}; write braces as {{{{ }}}}") from error
    for _, field, spec, conversion in parsed:
        if field == "" or spec or conversion:
            raise ConfigError(f"data.{setting} {text!r}: fields are column names, {{name}}")
    return [(literal, field) for literal, field, _, _ in parsed]


def _fill(parsed: list[tuple[str, str | None]], row: Row) -> str:
    out = []
    for literal, field in parsed:
        out.append(literal)
        if field is None:
            continue
        value = row.get(field)
        if value is None:
            raise BadRow(f"column {field!r} is missing")
        if not isinstance(value, str):
            raise BadRow(f"column {field!r} is {type(value).__name__}, not text")
        out.append(value)
    return "".join(out)
