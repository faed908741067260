"""Settings that an older release wrote down, as this one reads them.

A setting that a record lacks has its default: it did not exist then, and new settings are made so
that their default is what the code did before. Where that is not so, or a setting goes or gets
another name or meaning, one of the tables below says what the old record meant. Records say with
`schema_version` which release wrote them; 0 is the one before that was written down.
`tests/fixtures/` has records of each, which a test opens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf.config import removed
from rlhf.config.keys import leaves, lookup
from rlhf.config.trees import flatten, nest

SCHEMA_VERSION = 1

Flat = dict[str, Any]


def _kl_loss_coef_unset(found: Flat) -> Flat:
    """0 meant "unset" once, which is null now, and 0 is 0."""
    name = "step3.ppo.kl_loss_coef"
    return found | {name: None} if found.get(name) == 0 else found


# schema_version of a record -> its settings (dotted name -> value), as the next version has them.
MIGRATIONS: dict[int, Callable[[Flat], Flat]] = {0: _kl_loss_coef_unset}
# Settings that no longer exist -> the default that they had: with it they decide nothing.
REMOVED: dict[str, Any] = {name: one.default for name, one in removed.REMOVED.items()}


def migrated(settings: Mapping[str, Any], version: int) -> Flat:
    """Dotted name -> value of an older record, by this release's names and meanings.

    What it lacks is left out; a removed setting stays only if it had another value than its
    default, so that whoever reads it can say so.
    """
    found = dict(settings)
    for number in range(version, SCHEMA_VERSION):
        found = MIGRATIONS.get(number, dict)(found)
    return {
        name: value
        for name, value in found.items()
        if name not in REMOVED or not _same(value, REMOVED[name])
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any], version: int) -> list[str]:
    """`name old -> new` for every setting that differs; `before` is a record's, of `version`."""
    before = migrated(before, version)
    told = []
    for name in sorted(before.keys() | now.keys()):
        if name in leaves() and name not in now:
            continue  # a setting that no longer decides a result
        old = before[name] if name in before else _default(name)
        new = now[name] if name in now else _default(name)
        if not _same(old, new):
            gone = lookup(name) is None
            told.append(f"{name} {old!r} -> {'no longer a setting' if gone else repr(new)}")
    return told


def without_removed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's nested settings without those that no longer exist and have their old default."""
    flat = flatten(tree)
    gone = [name for name in REMOVED if name in flat and _same(flat[name], REMOVED[name])]
    return (
        nest({name: value for name, value in flat.items() if name not in gone})
        if gone
        else (dict(tree))
    )


def _default(name: str) -> Any:
    """An entry of a mapping (data.columns.prompt) is absent by default."""
    key = leaves().get(name)
    return key.default if key is not None else None


def _same(one: Any, other: Any) -> bool:
    return bool(_plain(one) == _plain(other))


def _plain(value: Any) -> Any:
    """Records went through JSON: a tuple is a list there."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
