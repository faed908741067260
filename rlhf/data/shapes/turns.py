"""Conversations in one form: roles, content and tool calls as chat templates expect them."""

from __future__ import annotations

import json
from typing import Any

from rlhf.data.sources.base import BadRow
from rlhf.data.templates import Messages

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Keys of a message that change what it says or whether it is learned; refused unless empty.
_REFUSED = ("function_call", "images", "audio", "video", "weight", "train")


def is_turn(value: Any) -> bool:
    """Whether it looks like one message."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def turns(value: Any, column: str) -> Messages:
    """A list of messages (or one) as `role`, `content` and what else a template may know.

    `from`/`value` mean `role`/`content`; roles are ours (ROLES); text parts are joined;
    arguments of tool calls are mappings. Raises BadRow naming the role, the type or the key
    that is not known.
    """
    if is_turn(value):
        value = [value]
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else type(value).__name__
        raise BadRow(f"column {column!r} is {kind}, not a list of messages")
    return [_turn(one, column) for one in value]


def _turn(message: Any, column: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"column {column!r}: a message is {type(message).__name__}, not an object")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise BadRow(f"column {column!r}: a message lacks role (or from)")
    if role not in ROLES:
        raise BadRow(f"column {column!r}: unknown role {role!r}; known: {', '.join(ROLES)}")
    for key in _REFUSED:
        if message.get(key) not in (None, [], {}, "", 1, True):
            raise BadRow(f"column {column!r}: a message has {key!r}, which is not supported")
    calls = message.get("tool_calls") or None
    found: dict[str, Any] = {"role": ROLES[role]}
    found["content"] = _content(message, column, may_lack=bool(calls))
    if calls:
        found["tool_calls"] = [_call(one, column) for one in calls]
    reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
    if reasoning is not None:
        found["reasoning_content"] = reasoning
    for key in ("name", "tool_call_id"):
        if message.get(key):
            found[key] = message[key]
    return found


def _content(message: dict[str, Any], column: str, *, may_lack: bool) -> str:
    content = message.get("content", message.get("value"))
    if content is None and may_lack:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, column) for part in content)
    if not isinstance(content, str):
        raise BadRow(f"column {column!r}: a message lacks content (or value)")
    return content


def _part(part: Any, column: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadRow(f"column {column!r}: content of type {kind!r}; only text can be read")
    return part["text"]


def _call(call: Any, column: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"column {column!r}: a tool call lacks the function's name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise BadRow(f"column {column!r}: a tool call's arguments are broken JSON") from None
    known = {"name": function["name"], "arguments": arguments}
    extra = {"id": call["id"]} if call.get("id") else {}
    return {**extra, "type": "function", "function": known}


def extras(messages: Messages) -> set[str]:
    """What the messages have that not every chat template knows."""
    found = {key for one in messages for key in ("tool_calls", "reasoning_content") if one.get(key)}
    return found | ({"role tool"} if any(one["role"] == "tool" for one in messages) else set())
