"""Which shape a data set has: decided once, from its columns and its first rows, or refused."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from rlhf.config.schema import DataConfig
from rlhf.data import placeholders
from rlhf.data.shapes import cells, labels
from rlhf.data.shapes.base import ANSWERS, MEANING, PAIRS, SLOTS, Context, Example, Kind, Values
from rlhf.data.shapes.combine import repeats
from rlhf.data.shapes.table import SHAPES
from rlhf.data.shapes.turns import extras
from rlhf.data.sources.base import BadRow, DataSet, NoPreference, Part, Row
from rlhf.errors import ConfigError, DataError

FIRST_ROWS = 1000  # of each file or split
_LISTS = ("answers", "scores", "ranks", "tools", "messages", "first", "second")
_TEXT_OR_TURNS = ("prompt", *ANSWERS)
_EMPTY: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True)
class Shape:
    """How the rows of one data set are read.

    decode: columns whose text holds lists. unused: columns that nothing reads. watched: of these,
    the ones that would change the meaning but were empty so far. gives: answers that the first rows
    have. extras: what they need of a chat template (`tool_calls`, `role tool`, `tools`,
    `reasoning_content`).
    """

    kind: Kind
    source: str
    context: Context
    format: placeholders.Parsed | None
    known: frozenset[str]
    decode: frozenset[str]
    unused: tuple[str, ...]
    watched: frozenset[str]
    gives: frozenset[str] = frozenset()
    extras: frozenset[str] = frozenset()
    strip: bool = False  # the prompt is taken off where answers begin with it
    notes: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()  # columns that reward functions and judges are given

    def values(self, row: Row) -> Values:
        """A row's values by slot. Raises BadRow: a cell that cannot be decoded."""
        found: Values = {}
        for slot, column in self.context.columns.items():
            value = row.get(column)
            if column in self.decode and isinstance(value, str) and value.strip():
                value = cells.decode(value, column)
            found[slot] = value
        if self.format is not None:
            found["prompt"] = placeholders.fill(self.format, row)
        return found

    def read(self, row: Row) -> list[Example]:
        """The examples of one row. Raises BadRow."""
        assert self.kind.read is not None
        return self.kind.read(self.values(row), self.context)

    def lines(self) -> list[str]:
        """For printing: what is read as what, what is not used, what was noticed."""
        columns = dict(self.context.columns)
        parts, margin = [], ""
        if self.format is not None:
            fields = dict.fromkeys(placeholders.fields(self.format))
            parts.append(f"{' + '.join(fields)} -> prompt (data.prompt_format)")
        else:
            asked = [columns.pop(slot) for slot in ("system", "prompt", "input") if slot in columns]
            said = " + ".join(asked)
            parts += [said if said == "prompt" else f"{said} -> prompt"] if asked else []
        if "margin" in columns:
            margin = f"{columns.pop('margin')} -> margin (used with step2.margin=column)"
        parts += [c if c == slot else f"{c} -> {slot}" for slot, c in columns.items()]
        parts += [margin] if margin else []
        rest = f"; kept for rewards: {', '.join(self.kept)}" if self.kept else ""
        rest += f"; not used: {', '.join(self.unused)}" if self.unused else ""
        return [f"{self.source}: read as {self.kind.name}: {', '.join(parts)}{rest}", *self.notes]


def shapes_of(one: DataSet, data: DataConfig) -> list[tuple[Shape, tuple[Part, ...]]]:
    """The shapes of an opened data set, each with the parts that have it; mostly one.

    Parts go together whose columns are the same or some of another's (a test file with prompts
    alone); a file of conversations beside a file of pairs has a shape of its own.
    """
    first = {part.name: _first_rows(part) for part in one.parts}
    columns = {
        name: dict.fromkeys(key for row in rows for key in row) for name, rows in first.items()
    }
    groups: list[list[Part]] = []
    for part in sorted(one.parts, key=lambda part: (-len(columns[part.name]), part.name)):
        names = columns[part.name].keys()
        home = next((g for g in groups if names <= columns[g[0].name].keys()), None)
        if home is None:
            groups.append([part])
        else:
            home.append(part)
    everywhere = {name for found in columns.values() for name in found}
    shapes = []
    for group in groups:
        own = columns[group[0].name]
        # A column of another file's; a name that no file has is left, and refused.
        mapped = {s: c for s, c in data.columns.items() if c in own or c not in everywhere}
        rows = [row for part in group for row in first[part.name]]
        source = group[0].name if len(group) == 1 else one.name
        narrowed = data.model_copy(update={"columns": mapped})
        shapes.append((detect(list(own), rows, narrowed, source=source), tuple(group)))
    return shapes


def _first_rows(part: Part) -> list[Row]:
    rows = (row for _, row in part.rows() if not isinstance(row, BadRow))
    return list(islice(rows, FIRST_ROWS))


def detect(
    columns: Sequence[str], first_rows: Sequence[Row], data: DataConfig, *, source: str = "data"
) -> Shape:
    """The shape of rows with these columns.

    Raises ConfigError (settings that do not fit the columns) and DataError (no known shape, a
    column that changes the meaning and is not used, rows that cannot be read), with the columns
    that were found and what to type.
    """
    usable = [name for name in columns if name not in data.ignore_columns]
    if not columns:  # nothing that can be read: every row will be counted as bad
        nothing = Context({name: name for name in _TEXT_OR_TURNS}, plain=True)
        empty = frozenset[str]()
        return Shape(SHAPES["pairs"], source, nothing, None, empty, empty, (), empty)
    parsed = _prompt_format(data, usable, source)
    for name in data.keep_columns:
        _must_exist(name, columns, f"data.keep_columns=[{name}]", source)
    found = _slots(usable, data, source)
    if parsed is not None:
        found = {s: c for s, c in found.items() if s not in ("input", "system")}
        found["prompt"] = "prompt"
    kind = _kind(found, usable, data, source)
    if kind.read is None:
        reason = kind.becomes.format(label=found["label"])
        raise DataError(f"{source}: columns {', '.join(columns)}: {reason}")
    slots = _used(kind, found, first_rows, data)
    if parsed is not None:
        del slots["prompt"]
    fields = placeholders.fields(parsed) if parsed else []
    read = {*slots.values(), *fields, *data.keep_columns}
    unused = tuple(name for name in columns if name not in read)
    telling = [name for name in unused if name in MEANING and name not in data.ignore_columns]
    filled = [name for name in telling if any(row.get(name) not in _EMPTY for row in first_rows)]
    if filled:
        raise DataError(unused_column(filled[0], kind, source, columns))
    shape = Shape(
        kind,
        source,
        Context(slots, _is_plain(found, data, parsed)),
        parsed,
        frozenset(columns) | set(data.ignore_columns),
        frozenset(_decoded(slots, first_rows)),
        unused,
        frozenset(telling),
        kept=tuple(data.keep_columns),
    )
    if kind.name == "labelled_pairs":
        given = [row.get(slots["label"]) for row in first_rows]
        names = (slots["first"], slots["second"], slots["label"])
        table = labels.meanings(*names, given, data.labels)
        shape = replace(shape, context=replace(shape.context, labels=table))
    return _tried(shape, first_rows, data, columns)


def unused_column(name: str, kind: Kind, source: str, columns: Iterable[str]) -> str:
    """The message for a column that changes the meaning of the rows and is not read."""
    slots = [slot for slot in (*kind.needs, *kind.may) if name in SLOTS.get(slot, ())]
    use = f" Use it (data.columns.{slots[0]}={name})," if slots else ""
    return (
        f"{source}: column {name!r} may change what a row means, and {kind.name} does not read "
        f"it (columns found: {', '.join(columns)}).{use} "
        f"{'c' if use else 'C'}hoose another shape (data.format), name it in data.prompt_format, "
        f"or leave it out knowingly: data.ignore_columns=[{name}]"
    )


def _prompt_format(
    data: DataConfig, columns: Sequence[str], source: str
) -> placeholders.Parsed | None:
    if not data.prompt_format:
        return None
    parsed = placeholders.parse(data.prompt_format, "prompt_format")
    names = placeholders.fields(parsed)
    if not names:
        raise ConfigError(
            f"data.prompt_format {data.prompt_format!r}: names no column, so all prompts would be "
            f"equal; write columns in braces, e.g. {{{columns[0] if columns else 'prompt'}}}"
        )
    for name in names:
        _must_exist(name, columns, "data.prompt_format", source)
    return parsed


def _must_exist(name: str, columns: Sequence[str], setting: str, source: str) -> None:
    if name in columns:
        return
    near = difflib.get_close_matches(name, columns, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{setting}: {source} has no column {name!r}; it has {', '.join(columns)}{hint}"
    )


def _slots(columns: Sequence[str], data: DataConfig, source: str) -> dict[str, str]:
    """Slot -> column, for everything that could be meant; a column serves one slot."""
    unknown = sorted(set(data.columns) - set(SLOTS))
    if unknown:
        raise ConfigError(
            f"data.columns: {', '.join(unknown)} unknown; ours are {', '.join(SLOTS)}"
        )
    found = dict(data.columns)
    for slot, column in found.items():
        _must_exist(column, columns, f"data.columns.{slot}={column}", source)
    taken = set(found.values())
    for slot, names in SLOTS.items():
        free = next((name for name in names if name in columns and name not in taken), None)
        if slot not in found and free is not None:
            found[slot] = free
            taken.add(free)
    for (a, b), (score_a, score_b) in PAIRS.items():
        if {a, b} <= set(columns) - taken and not {"first", "second"} & set(found):
            found.update(first=a, second=b)
            if {score_a, score_b} <= set(columns):
                found.update(first_score=score_a, second_score=score_b)
    # A column called `prompt` is a whole prompt: an `input` beside it may be in it already.
    if found.get("prompt") == "prompt" and not {"prompt", "input"} & set(data.columns):
        found.pop("input", None)
    return found


def _kind(found: Mapping[str, str], columns: Sequence[str], data: DataConfig, source: str) -> Kind:
    if data.format != "auto":
        kind = SHAPES[data.format]
        lacking = [need for need in kind.needs if not _has(need, found)]
        if lacking:
            raise ConfigError(
                f"data.format {data.format!r} needs {', '.join(lacking)}; {source} has the columns "
                f"{', '.join(columns)}: map them, e.g. data.columns.{lacking[0].split('|')[0]}=NAME"
            )
        return kind
    for kind in SHAPES.values():
        if all(_has(need, found) for need in kind.needs):
            return kind
    first = next(iter(columns), "NAME")
    raise DataError(
        f"{source}: no known shape has the columns {', '.join(columns) or '(none: no rows)'}. Say "
        f"which is which: data.columns.prompt={first} with data.columns.chosen=... and "
        "data.columns.rejected=..., or data.columns.response=...; docs/data.md lists the shapes"
    )


def _has(need: str, found: Mapping[str, str]) -> bool:
    return any(slot in found for slot in need.split("|"))


def _used(
    kind: Kind, found: Mapping[str, str], rows: Sequence[Row], data: DataConfig
) -> dict[str, str]:
    """The slots that this kind of row reads, in the table's order."""
    slots = {
        s: found[s] for need in (*kind.needs, *kind.may) for s in need.split("|") if s in found
    }
    if kind.name == "pairs":
        if "response" not in data.columns and slots.get("response") != "response":
            slots.pop("response", None)
        whole = any(_begins_a_dialogue(row.get(slots["chosen"])) for row in rows)
        alone = any(row.get(slots["chosen"]) is None for row in rows)
        if ("prompt" in slots or whole) and not alone:
            slots.pop("messages", None)
    elif kind.name == "conversation" and all(row.get(slots["messages"]) for row in rows):
        slots.pop("prompt", None)
        slots.pop("response", None)
    return slots


def _begins_a_dialogue(value: Any) -> bool:
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return cells.holds_messages(value)
    return value[0].get("role", value[0].get("from")) not in ("assistant", "gpt")


def _is_plain(
    found: Mapping[str, str], data: DataConfig, parsed: placeholders.Parsed | None
) -> bool:
    formatted = parsed is not None or data.response_format != "{text}"
    return formatted or "prompt" in data.columns or found.get("prompt", "prompt") == "prompt"


def _decoded(slots: Mapping[str, str], rows: Sequence[Row]) -> Iterable[str]:
    """Columns of text in which every filled cell is a list (a conversation) written out."""
    for slot, column in slots.items():
        values = [row[column] for row in rows if row.get(column) not in _EMPTY]
        written = cells.holds_list if slot in _LISTS else cells.holds_messages
        if slot in (*_LISTS, *_TEXT_OR_TURNS) and values and all(map(written, values)):
            yield column


def _tried(shape: Shape, rows: Sequence[Row], data: DataConfig, columns: Sequence[str]) -> Shape:
    """The shape after reading the first rows with it: refused if none of them can be read."""
    read: list[Example] = []
    bad: Counter[str] = Counter()
    for row in rows:
        try:
            read += shape.read(row)
        except NoPreference:
            continue
        except BadRow as reason:
            bad[str(reason)] += 1
    if rows and sum(bad.values()) == len(rows):
        reasons = "; ".join(f"{reason} ({count})" for reason, count in bad.most_common(3))
        raise DataError(
            f"{shape.source}: none of the first {len(rows)} rows can be read as {shape.kind.name}: "
            f"{reasons}. Columns found: {', '.join(columns)}. Map others with data.columns, or "
            "choose the shape with data.format; docs/data.md lists them"
        )
    needs = {name for one in read if not isinstance(one.prompt, str) for name in _extras(one)}
    if any(one.tools and isinstance(one.prompt, str) for one in read):
        raise DataError(unused_column("tools", shape.kind, shape.source, columns))
    strip = _strip(shape, read, data)
    notes = _notes(read, data)
    if strip:
        notes.append("every answer begins with its prompt, which is taken off")
    return replace(
        shape,
        strip=strip,
        gives=frozenset(name for one in read for name in one.answers),
        extras=frozenset(needs),
        notes=tuple(notes),
    )


def _extras(one: Example) -> set[str]:
    turns = [
        t for part in (one.prompt, *one.answers.values()) if isinstance(part, list) for t in part
    ]
    return extras(turns) | ({"tools"} if one.tools else set())


def _strip(shape: Shape, read: Sequence[Example], data: DataConfig) -> bool:
    if data.prompt_in_answers != "auto":
        return data.prompt_in_answers == "strip"
    said = [found for one in read if (found := repeats(one)) is not None]
    if any(said) and not all(said):
        raise DataError(mixed(shape.source, sum(said), len(said)))
    return any(said)


def mixed(source: str, repeated: int, of: int) -> str:
    """The message for answers of which some repeat the prompt."""
    return (
        f"{source}: in {repeated} of {of} rows every answer begins with the whole prompt, in the "
        "others not. Say what to do: data.prompt_in_answers=strip takes it off wherever it is, "
        "data.prompt_in_answers=keep trains on it as part of the answer"
    )


def _notes(read: Sequence[Example], data: DataConfig) -> list[str]:
    lacks = Counter(one.lacks for one in read if one.lacks)
    notes = [f"{count} of the first {len(read)} rows: {why}" for why, count in lacks.items()]
    for name in ANSWERS:
        empty = sum(one.answers.get(name) == "" for one in read)
        if empty:
            notes.append(f"{name} is empty in {empty} of the first {len(read)} rows: left out")
    if data.response_format != "{text}" and any(isinstance(one.prompt, list) for one in read):
        notes.append("data.response_format is not used for conversations: their template rules")
    return notes
