"""Which chat template a step trains with and which one its artifact carries: one decision.

Torch-free: the preview of the rows and the steps decide in the same words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jinja2

from rlhf.config.schema import DataConfig, ResolvedStep
from rlhf.config.trees import at
from rlhf.data.shapes import shapes_of
from rlhf.data.shapes.detect import FIRST_ROWS
from rlhf.data.sources import BadRow, DataSet, open_data_sets
from rlhf.data.templates import DEFAULT, TEMPLATES, Messages, sandbox_render, template_text
from rlhf.errors import ConfigError

UNKNOWN = "\0unknown"
"""The own template of a model that is not on this machine yet."""
_X = "\ue000x\ue000"


@dataclass(frozen=True)
class Prompts:
    """What the prompts of a run's data are: how many conversations, and the plain texts, among the
    first rows of each file."""

    conversations: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """text, saved: a name of ours or Jinja text; `text` renders conversations, `saved` is carried
    by the artifact (None: none is). origin: where `text` comes from. sentence: the decision in
    words."""

    text: str
    saved: str | None
    origin: Literal["setting", "own", "default"]
    sentence: str


def decide_template(setting: str, own: str | None, prompts: Prompts) -> Template:
    """`setting`: data.template. `own`: the model's or parent's template, None, or UNKNOWN.

    A model keeps its own template unless told otherwise; one without gets the project's default.
    Plain prompts are trained as they are: the artifact then carries a template only if that gives
    their text again. Raises ConfigError: `model` where there is none, a set template that nothing
    would be trained with.
    """
    text, origin, name = _chosen(setting, own)
    replaced = own not in (None, UNKNOWN) and text != own
    if prompts.conversations or not prompts.texts:
        sentence = f"conversations are written by {name}, which is saved with the model"
        if replaced:
            sentence += " in place of its own"
        if prompts.texts:
            sentence += "; prompts that are text stay as they are"
            if not reproduces(text, prompts.texts):
                sentence += (
                    ", and that template does not write their form (data.plain_prompts=turns: it "
                    "writes them too)"
                )
        return Template(text, text, origin, sentence)
    candidates = [text] if origin == "setting" else [text, DEFAULT]
    saved = next((one for one in candidates if reproduces(one, prompts.texts)), None)
    sentence = "prompts are text and stay as they are"
    if saved is not None:
        what = name if saved == text else saved
        sentence += f"; {what} gives the same text for a user's message and is saved with the model"
    elif own == UNKNOWN and origin == "own":
        sentence += "; a template is saved only if it gives the same text for a user's message"
    elif origin == "setting":
        raise ConfigError(
            f"data.template {_short(setting)}: the prompts are text, are used as they are, and "
            "this template does not give such text: nothing would be trained with it "
            f"(first prompt: {prompts.texts[0][:60]!r}). Put them into it as turns "
            "(data.plain_prompts=turns), or leave data.template at auto"
        )
    else:
        sentence += "; no chat template is saved with the model, since none gives their text"
    if own not in (None, UNKNOWN, saved):
        sentence += (
            ". The model's own template is not used: data.plain_prompts=turns trains with it"
        )
    return Template(text, saved, origin, sentence)


def _chosen(setting: str, own: str | None) -> tuple[str, Literal["setting", "own", "default"], str]:
    """(template, origin, how it is called in a sentence)."""
    if setting in ("auto", "model"):
        if own == UNKNOWN:
            other = f", if it has one, else by {DEFAULT}" if setting == "auto" else ""
            return UNKNOWN, "own", f"the model's own chat template{other}"
        if own:
            return own, "own", "the model's own chat template"
        if setting == "model":
            raise ConfigError(
                "data.template 'model': this model has no chat template of its own; use "
                "human_assistant, chatml or Jinja text"
            )
        return DEFAULT, "default", f"the template {DEFAULT} (the model has none of its own)"
    called = (
        f"the template {setting}" if setting in TEMPLATES else "the Jinja text of data.template"
    )
    return setting, "setting", called


def _short(setting: str) -> str:
    return repr(setting if len(setting) < 40 else setting[:37] + "...")


def reproduces(template: str, texts: Sequence[str]) -> bool:
    """Whether a template gives each text for one user message (the part between what it puts before
    and after); the bos token aside."""
    if template == UNKNOWN:
        return False
    try:
        before, x, after = _single(template, _X).partition(_X)
        if not x or not (before or after):
            return False
        ends = len(before) + len(after)
        return all(
            len(text) >= ends
            and text.startswith(before)
            and text.endswith(after)
            and _single(template, text[len(before) : len(text) - len(after)]) == text
            for text in texts
        )
    except jinja2.TemplateError:
        return False


def _single(template: str, content: str) -> str:
    messages: Messages = [{"role": "user", "content": content}]
    return sandbox_render(TEMPLATES.get(template, template), messages)


def first_prompts(data: DataConfig, sets: Sequence[DataSet] | None = None) -> Prompts:
    """The prompts of the first rows of every file. Raises what `prepare` raises for them."""
    conversations, texts = 0, dict[str, None]()
    for one in open_data_sets(data) if sets is None else sets:
        for shape, parts in shapes_of(one, data):
            for part in parts:
                for _, row in islice(part.rows(), FIRST_ROWS):
                    try:
                        examples = [] if isinstance(row, BadRow) else shape.read(row)
                    except BadRow:
                        continue
                    for example in examples:
                        if isinstance(example.prompt, str) and data.plain_prompts == "as_is":
                            texts[example.prompt] = None
                        else:
                            conversations += 1
    return Prompts(conversations, tuple(texts))


def choose_template(tokenizer: Any, data: DataConfig) -> Template:
    """Decide, and give the tokenizer the template that is saved with it (`chat_template`).

    `prepare` with this tokenizer and these settings then renders with the template decided on.
    Raises ConfigError.
    """
    template = decide_template(
        data.template, one_template(tokenizer.chat_template), first_prompts(data)
    )
    tokenizer.chat_template = template.saved and template_text(tokenizer, template.saved)
    return template


def one_template(found: Any) -> str | None:
    """The template of a tokenizer that has one, several by name (`default` is it), or none."""
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}
    if isinstance(found, dict):
        if found and "default" not in found:
            raise ConfigError(
                f"the model has the chat templates {', '.join(found)} and none called default; "
                "choose with data.template (Jinja text)"
            )
        found = found.get("default")
    return found or None


def stage_templates(
    stages: Sequence[ResolvedStep], sets: Sequence[DataSet] | None = None
) -> list[Template]:
    """The decision of each step of a run that is planned, in the order of the steps.

    sets: the run's opened data sets; they are opened where they are not given. A parent that this
    run has yet to train will carry what its step decides on.
    """
    prompts = first_prompts(stages[0].config.data, sets)
    found: list[Template] = []
    first: Template | None = None
    for stage in stages:
        config, parent = stage.config, stage.parents.get("sft")
        row = stage.row
        name = (at(config, row.base) if row.base else None) or parent
        if name is None and not row.needs:
            name = "tiny:"
        own = own_template(name)
        if own == UNKNOWN and first is not None and name == parent:
            own = first.saved
        template = decide_template(config.data.template, own, prompts)
        first = template if row.makes == "sft" else first
        found.append(template)
    return found


def own_template(model: str | None) -> str | None:
    """The template of a model directory or a tiny model, None if it has none; else UNKNOWN."""
    if model and model.startswith("tiny:"):
        return None
    directory = Path(model or "").expanduser()
    if not model or not directory.is_dir():
        return UNKNOWN
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8") or None
    try:
        config = json.loads((directory / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return one_template(config.get("chat_template"))
