"""Hostfiles (`host slots=N` lines) and the include and exclude filters on them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from rlhf.errors import ConfigError, RequirementError

_LINE = re.compile(r"(?P<host>[^\s#:@,]+)\s+slots\s*=\s*(?P<slots>[0-9]{1,6})")
_NUMBER = re.compile(r"[0-9]{1,6}")
_FORMAT = "a line is `host slots=N`, e.g. `worker-0 slots=8`"


def read_hostfile(path: Path | str) -> dict[str, int]:
    """Host -> slots, in the file's order.

    Raises RequirementError if it cannot be read (deepspeed would run on this machine alone without
    a word), ConfigError with file:line if it is malformed, names a host twice, or has no slots.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequirementError(
            f"hostfile {path}: cannot be read ({error}). Check --hostfile; {_FORMAT}"
        ) from error
    hosts: dict[str, int] = {}
    seen: dict[str, int] = {}
    for number, raw in enumerate(lines, start=1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"{path}:{number}: {line!r} cannot be understood; {_FORMAT}")
        host, slots = match["host"], int(match["slots"])
        if host in hosts:
            raise ConfigError(
                f"{path}:{number}: host {host!r} was already given in line {seen[host]}: "
                "keep one line with all its slots"
            )
        if slots == 0:
            raise ConfigError(
                f"{path}:{number}: host {host!r} has slots=0: give 1 or more, or remove the line"
            )
        hosts[host], seen[host] = slots, number
    if not hosts:
        raise ConfigError(f"{path}: names no host; {_FORMAT}")
    return hosts


def parse_filter(text: str, flag: str) -> dict[str, list[int] | None]:
    """`host:0,1@other` -> host -> slots (None: all). Raises ConfigError."""
    chosen: dict[str, list[int] | None] = {}
    for node in text.split("@"):
        host, colon, slots = node.strip().partition(":")
        numbers = [slot.strip() for slot in slots.split(",")] if colon else []
        if not host or not all(map(_NUMBER.fullmatch, numbers)):
            raise ConfigError(
                f"{flag} {text!r}: {node!r} cannot be understood; write `host:0,1@other` "
                "(devices 0 and 1 of host, all of other)"
            )
        if host in chosen:
            raise ConfigError(f"{flag} {text!r}: host {host!r} is named twice: name it once")
        chosen[host] = sorted({int(number) for number in numbers}) if colon else None
    return chosen


def apply_filters(
    hosts: Mapping[str, list[int]], include: str | None = None, exclude: str | None = None
) -> dict[str, list[int]]:
    """Host -> the device numbers left; hosts without any are dropped. Raises ConfigError."""
    if not include and not exclude:
        return {host: list(devices) for host, devices in hosts.items()}
    flag, text = ("--include", include) if include else ("--exclude", exclude)
    chosen = parse_filter(text or "", flag)
    for host, slots in chosen.items():
        if host not in hosts:
            raise ConfigError(f"{flag} {text!r}: no host {host!r}; there is {', '.join(hosts)}")
        if unknown := sorted(set(slots or []) - set(hosts[host])):
            raise ConfigError(
                f"{flag} {text!r}: host {host!r} has no device {unknown[0]}; "
                f"it has {', '.join(map(str, hosts[host]))}"
            )
    left: dict[str, list[int]] = {}
    for host, devices in hosts.items():
        named = host in chosen
        slots = chosen.get(host)
        picked = set(devices if slots is None else slots) if named else set()
        kept = [device for device in devices if (device in picked) == (flag == "--include")]
        if kept:
            left[host] = kept
    if not left:
        raise ConfigError(f"{flag} {text!r} leaves no device: nothing could run")
    return left


def filter_text(hosts: Mapping[str, list[int]]) -> str:
    """The include filter that names exactly these devices."""
    return "@".join(f"{host}:{','.join(map(str, devices))}" for host, devices in hosts.items())
