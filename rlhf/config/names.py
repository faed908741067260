"""Names of models, data sets and hubs: their forms, and which of them need the network."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from rlhf.errors import ConfigError

DEFAULT_ENDPOINT = "https://huggingface.co"
_SIZE = re.compile(r"\d+(\.\d+)?[mb]")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# `sample:courtesy` is no configuration of a data set `sample`: only owner/name takes one.
_HUB_DATASET = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*|(?!:)))(:[\w.-]+)?(@[\w./-]+)?"
)
# Bytes: Linux' limits for a name and a path, less what a run adds to its own (seeds, temporary
# files, artifacts inside it).
LONGEST_NAME, LONGEST_PATH, LONGEST_RUN, LONGEST_OUTPUT = 255, 4095, 200, 3500
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")


def refuse_long(
    text: str, setting: str, *, name: int = LONGEST_NAME, path: int = LONGEST_PATH
) -> str:
    """`text`, unless as a path it, or a name in it, has more bytes than file systems take.

    URLs pass: signed ones are long. Raises ConfigError.
    """
    if "://" in text:
        return text
    raw = text.encode("utf-8", "surrogatepass")
    longest = max(map(len, raw.split(b"/")))
    if longest > name:
        found, rule = f"a name of {longest} bytes", f"at most {name}"
    elif len(raw) > path:
        found, rule = f"a path of {len(raw)} bytes", f"at most {path}"
    else:
        return text
    raise ConfigError(
        f"{setting} = {text[:40]!r}...: {found} (needed: {rule}) -> choose a shorter one"
    )


def expand_size(name: str) -> str:
    """`1.3b` -> `facebook/opt-1.3b`; every other name as it is."""
    name = name.strip()
    return f"facebook/opt-{name.lower()}" if _SIZE.fullmatch(name.lower()) else name


def absolute_if_local(name: str) -> str:
    """A name that is an existing path becomes absolute, so that it means the same anywhere."""
    refuse_long(name, "a path")
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def is_path_like(name: str) -> bool:
    """Does the name say by its form that it is a path (whether or not it exists)?"""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep in name[-1:]


def is_hub_model(name: str) -> bool:
    """Is this model fetched from a hub?"""
    if name.startswith(("tiny:", "package:")) or name.endswith(".gguf"):
        return False
    return not Path(name).expanduser().exists() and _HUB_ID.fullmatch(name) is not None


def hub_dataset(name: str) -> str | None:
    """The repository of a data set that is fetched from a hub, without `:config` and `@revision`.

    None for `sample:` data, URLs and files.
    """
    found = _HUB_DATASET.fullmatch(name)
    if found is None or name.endswith(_DATA_SUFFIXES) or Path(name).expanduser().exists():
        return None
    return found["repo"]


def is_hub_dataset(name: str) -> bool:
    """Is this data set fetched from a hub?"""
    return hub_dataset(name) is not None


def normalize_endpoint(text: str | None) -> str | None:
    """A hub's address without blanks and trailing slashes; None for an empty one.

    An empty or slash-ended HF_ENDPOINT breaks `datasets` in ways that name no cause.
    Raises ConfigError unless it is http(s) with a host and without a password.
    """
    text = (text or "").strip().rstrip("/")
    if not text:
        return None
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or " " in text:
        raise ConfigError(
            f"hub endpoint {text!r}: must be an http:// or https:// address, "
            f"e.g. --hf-endpoint {DEFAULT_ENDPOINT}"
        )
    return refuse_credentials(text, "hub.endpoint")


# Azure's: scheme://container@account... names a place, not a user.
CONTAINER_URL = re.compile(r"(?:abfss?|wasbs?|az)://[\w$-]+@[^:@/]", re.IGNORECASE)


def refuse_credentials(text: str, setting: str) -> str:
    """`text`, unless it is a URL with a password in it: that would end up in the run's files."""
    authority = text.split("://", 1)[1].split("/", 1)[0] if "://" in text else ""
    if "@" in authority and not (CONTAINER_URL.match(text) and authority.count("@") == 1):
        shown = re.sub(r"://[^/@]*@", "://***@", text)
        raise ConfigError(
            f"{setting} = {shown!r}: a user name or password in a URL would be written to the "
            "run's files. Put it into the environment instead (HF_TOKEN, AWS_ACCESS_KEY_ID, ...)"
        )
    return text
