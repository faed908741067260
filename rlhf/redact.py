"""Secrets out of text: for logs, records, resolved settings and whatever else a run writes down.

What counts as a secret:

- the value of an environment variable named like one (`HF_TOKEN`, `PGPASSWORD`, ...), as it is, as
  a URL has it and as JSON or Python escape it, if it has 8 characters or more: shorter ones would
  blot out ordinary words;
- tokens in their issuers' forms (`hf_...`, `ghp_...`, `sk-...`: rlhf/secrets.py), what follows
  `Bearer`, `Basic` or `Authorization:`, and webhooks;
- user names and passwords in URLs;
- the whole query of a URL that is signed (`X-Amz-Signature`, `sig`, `token`, ...): so a link that
  was signed again reads the same.

Pure: text in, text out.
"""

from __future__ import annotations

import codecs
import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from rlhf import secrets

MARK = "<redacted>"
# The driver gives a step's processes the settings that `hide` took out of resolved.json in this
# variable, as JSON: an environment is in no file, and on this machine only its owner can read it.
HIDDEN_SETTINGS = "RLHF_HIDDEN_SETTINGS"
SHORTEST = 8
_SECRET_FIELD = (
    r"(?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|[\w.-]*token"
    r"|[\w.-]*secret|[\w.-]*passw(?:or)?d|(?:api|access|account|subscription)?[_-]?key"
    r"|awsaccesskeyid|googleaccessid|key-pair-id|policy|auth|authorization)"
)
_END = r"\s\"'<>\\"  # what cannot be inside a URL where text is quoted, listed or escaped
_URL = re.compile(rf"(\b(?:abfss?|wasbs?|az))?://[^{_END}]+", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/@?#]+@")
# Azure's scheme://container@account: what has no colon names a place.
_CONTAINER = re.compile(r"\w+://[\w$-]+@[^:@/]")
_SIGNED = re.compile(rf"\?(?:[^#]*&)?{_SECRET_FIELD}=[^#]*", re.IGNORECASE)
_FIELD = re.compile(rf"([?&]{_SECRET_FIELD}=)[^&{_END}]+", re.IGNORECASE)
_STARTS = ("://", *(f"{lead} " for lead in secrets.LEADS))
_MARKS = ("://", "?", "&", *map(str.lower, secrets.STARTS))
_LONGEST_HELD = 1 << 16


def secret_values(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Values of the environment's secrets (as they are, and as a URL has them), longest first."""
    found: set[str] = set()
    for name, value in (os.environ if environ is None else environ).items():
        if not secrets.sounds_secret(name):
            continue
        # A key of several lines shows up line by line where text is indented.
        for part in {value.strip(), *value.splitlines()}:
            if len(part.strip()) >= SHORTEST:
                found |= _spellings(part.strip())
    return tuple(sorted(found, key=lambda text: (-len(text), text)))


def _spellings(value: str) -> set[str]:
    """A value as it is, in a URL, in JSON (with and without other alphabets), in Python."""
    escaped = {json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (True, False)}
    return {value, quote(value, safe=""), repr(value)[1:-1], *escaped}


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """`text` with MARK for each secret; a second time changes nothing more."""
    return _redact(text, secret_values(environ))


def printable(text: str) -> str:
    """`text` without what would steer a terminal: control characters, escape sequences and marks
    that change the direction of writing are shown as `\\x1b` and the like; lines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def redact_tree(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """A copy of nested mappings and sequences with every text in it redacted; keys stay."""
    return _tree(value, secret_values(environ))


def hide(
    tree: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the tree redacted, dotted key -> original value) of the settings that held a secret."""
    known = secret_values(environ)
    hidden: dict[str, Any] = {}
    shown = {key: _hide(value, key, known, hidden) for key, value in tree.items()}
    return shown, hidden


def reveal(tree: Mapping[str, Any], hidden: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `hide`. Keys that the tree does not have are passed over."""
    return {key: _reveal(value, key, hidden) for key, value in tree.items()}


def first_redacted(value: Any, name: str = "") -> str | None:
    """Dotted key of the first value that still has MARK in it; None: there is none."""
    if isinstance(value, Mapping):
        inner = ((item, f"{name}.{key}" if name else str(key)) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        inner = ((item, name) for item in value)
    else:
        return name if isinstance(value, str) and MARK in value else None
    return next((found for item, key in inner if (found := first_redacted(item, key))), None)


class RedactedStream:
    """Redacts bytes that come in pieces, also where a secret lies across two of them.

    Only the end of what came is held back, and only if a secret may have begun in it.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._known = secret_values(environ)
        # beginning of a secret -> may it stand inside a word?
        self._starts = {start.lower(): False for start in secrets.STARTS}
        self._starts |= dict.fromkeys(_STARTS, True)
        self._starts |= dict.fromkeys(map(str.lower, self._known), True)
        self._held = ""
        # Keeps half a character back; escaped surrogates carry what is no UTF-8 through unchanged.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def feed(self, chunk: bytes) -> bytes:
        """What can be shown of this piece and of what was held back."""
        text = self._held + self._decoder.decode(chunk)
        cut = self._safe_length(text)
        if len(text) - cut > _LONGEST_HELD:
            cut = len(text)
        self._held = text[cut:]
        return self._shown(text[:cut])

    def end(self) -> bytes:
        """The rest."""
        rest, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return self._shown(rest)

    def _shown(self, text: str) -> bytes:
        return _redact(text, self._known).encode("utf-8", "surrogateescape")

    def _safe_length(self, text: str) -> int:
        """How much of the beginning holds no secret that may go on in the next piece."""
        cut, lower = len(text), text.lower()
        words = lower[-_LONGEST_HELD:].split()
        if words and not text[-1].isspace():
            last = words[-1]
            if any(mark in last for mark in _MARKS):
                cut -= len(last)
            begin = len(text) - len(last)
            while len(words) > 1 and words[-2].strip("\"':=").endswith(secrets.LEADS):
                words.pop()
                begin = lower.rindex(words[-1], 0, begin)
                cut = min(cut, begin)
        for start, anywhere in self._starts.items():
            for size in range(min(len(start), len(text)), 0, -1):
                begin = len(text) - size
                if lower.endswith(start[:size]) and (anywhere or not lower[:begin][-1:].isalnum()):
                    cut = min(cut, begin)
                    break
        pattern = _pattern(self._known)
        for match in pattern.finditer(text) if pattern else ():
            if match.start() < cut < match.end():
                cut = match.start()
        return cut


@functools.lru_cache(maxsize=8)
def _pattern(known: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, known))) if known else None


def _without_user(url: re.Match[str]) -> str:
    place = url[1] and _CONTAINER.match(url[0])
    return _SIGNED.sub("?" + MARK, url[0] if place else _USER.sub(MARK + "@", url[0]))


def _redact(text: str, known: tuple[str, ...]) -> str:
    if pattern := _pattern(known):
        text = pattern.sub(MARK, text)
    text = secrets.without_headers(text, MARK)
    if "://" in text:
        text = secrets.WEBHOOK.sub(rf"\1/{MARK}", text)
        text = _URL.sub(_without_user, text)
    if "=" in text:
        text = _FIELD.sub(rf"\1{MARK}", text)
    return secrets.TOKEN.sub(MARK, text)


def _tree(value: Any, known: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return _redact(value, known)
    if isinstance(value, Mapping):
        return {key: _tree(item, known) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tree(item, known) for item in value]
    return value


def _hide(value: Any, name: str, known: tuple[str, ...], hidden: dict[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _hide(item, f"{name}.{key}", known, hidden) for key, item in value.items()}
    shown = _tree(value, known)
    if shown != value and not isinstance(value, tuple):
        hidden[name] = value
    return shown


def _reveal(value: Any, name: str, hidden: Mapping[str, Any]) -> Any:
    if name in hidden:
        return hidden[name]
    if isinstance(value, Mapping):
        return {key: _reveal(item, f"{name}.{key}", hidden) for key, item in value.items()}
    return value
