"""Chat templates: one per run, saved with the tokenizer, the same in training and afterwards.

A template begins with the bos token exactly where the tokenizer itself would put one, since
`apply_chat_template` tokenises without adding special tokens.
"""

from __future__ import annotations

import functools
import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf.errors import ConfigError

Messages = list[dict[str, Any]]

_HUMAN_ASSISTANT = """\
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}
{%- elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] }}
{%- elif message['role'] == 'system' %}{{ ('' if loop.first else '\\n\\n') + message['content'] }}
{%- else %}{{ raise_exception('roles are system, user and assistant') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"""

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_PLAIN: Messages = [{"role": "user", "content": "a"}]
TEMPLATES = {"human_assistant": _HUMAN_ASSISTANT, "chatml": _CHATML}
DEFAULT = "human_assistant"  # of a model without a template of its own


def prepends_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a bos token before a text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def template_text(tokenizer: Any, name: str) -> str:
    """The Jinja text that a `data.template` setting means for this tokenizer.

    `auto` is the tokenizer's own, or DEFAULT where it has none. Raises ConfigError: `model` without
    a template of its own, `chatml` on a vocabulary without its tokens, a name that is none of ours
    and no Jinja text.
    """
    text = tokenizer.chat_template
    if isinstance(text, dict):
        text = text.get("default")
    if name == "auto":
        name = "model" if text else DEFAULT
    if name == "model":
        if not isinstance(text, str) or not text:
            raise ConfigError(
                "data.template 'model': this tokenizer has no chat template of its own; use "
                "human_assistant, chatml or Jinja text"
            )
        return text
    if name == "chatml":
        _need_tokens(tokenizer, ("<|im_start|>", "<|im_end|>"))
    if name in TEMPLATES:
        return ("{{- bos_token }}" if prepends_bos(tokenizer) else "") + TEMPLATES[name]
    if "{{" not in name:
        raise ConfigError(
            f"data.template {name!r}: neither auto, {', '.join(TEMPLATES)}, model nor Jinja text "
            "(which has {{ ... }} in it)"
        )
    return name


def _need_tokens(tokenizer: Any, tokens: tuple[str, ...]) -> None:
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        raise ConfigError(
            f"data.template 'chatml': the tokenizer has no token {', '.join(missing)}; use "
            "human_assistant, which needs none"
        )


def apply_template(tokenizer: Any, name: str) -> None:
    """Set `tokenizer.chat_template`, so that it is saved with it. Raises ConfigError."""
    text = template_text(tokenizer, name)
    try:
        render(tokenizer, text, _PLAIN, generate=True)
    except jinja2.TemplateError as error:
        raise ConfigError(f"data.template: {error} in {text!r}") from error
    tokenizer.chat_template = text


def render(
    tokenizer: Any, text: str, messages: Messages, *, generate: bool, tools: Any = None
) -> str:
    """Messages as text; `generate` ends it where the assistant's answer begins.

    Raises jinja2.TemplateError when the template refuses the messages.
    """
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=text,
            tools=tools,
            tokenize=False,
            add_generation_prompt=generate,
        )
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        # What an expression in the template raises is the template's fault, too.
        raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error


def template_bos(tokenizer: Any, text: str) -> str:
    """The bos token's text if the template begins with it, else the empty text.

    Raises ConfigError for a template that cannot be rendered.
    """
    bos = tokenizer.bos_token
    try:
        rendered = render(tokenizer, text, _PLAIN, generate=True)
    except jinja2.TemplateError as error:
        raise ConfigError(f"data.template: {error} in {text!r}") from error
    return bos if bos and rendered.startswith(bos) else ""


@functools.lru_cache(maxsize=32)
def _compiled(text: str) -> jinja2.Template:
    """In Jinja's sandbox, as transformers does it."""

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)


def sandbox_render(text: str, messages: Messages, generate: bool = True, tools: Any = None) -> str:
    """`render` without a tokenizer: bos and eos are empty. Raises jinja2.TemplateError."""
    try:
        return _compiled(text).render(
            messages=messages,
            add_generation_prompt=generate,
            bos_token="",
            eos_token="",
            tools=tools,
        )
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error
