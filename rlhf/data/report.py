"""What became of every row: counted, and located where something was wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import DataError

_PLACES = 5
CUT_ANSWERS = 0.1  # a larger share of cut answers is warned of


@dataclass
class DataReport:
    """Counts of one `prepare`.

    Every row read, and every pair beyond the first that a row gave (`extra`), is in exactly one of:
    bad, elsewhere, dropped, kept. `shapes`: what each data set was read as.
    `answers`: those of the kept rows that a step reads. `bad`: reason -> (count, first places).
    `dropped`: reason -> count. `truncated`: what was cut (kinds of prompts, `answer`; a pair has
    two answers) -> count, among the kept rows. `duplicates`: rows whose content was read before;
    they are kept. `elsewhere`: rows of other steps or splits.
    `notes`: what the sources say of their files.
    `places`: the first places of what is dropped, truncated or a duplicate, by its name in `lines`.
    """

    read: int = 0
    kept: int = 0
    elsewhere: int = 0
    answers: int = 0
    duplicates: int = 0
    extra: int = 0
    notes: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    bad: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    @property
    def bad_rows(self) -> int:
        """Unusable rows, over all reasons."""
        return sum(count for count, _ in self.bad.values())

    def add_bad(self, reason: str, where: str) -> None:
        """Count one unusable row and remember the first few places."""
        count, places = self.bad.get(reason, (0, []))
        self.bad[reason] = (count + 1, [*places, where] if count < _PLACES else places)

    def add_dropped(self, reason: str, where: str) -> None:
        """Count a row that is left out, though nothing is wrong with it."""
        self.dropped[reason] += 1
        self._remember(f"dropped: {reason}", where)

    def add_truncated(self, what: str, count: int, where: str) -> None:
        """Count what was cut in a row that is kept."""
        if count:
            self.truncated[what] += count
            self._remember(f"truncated: {what}", where)

    def add_duplicate(self, where: str) -> None:
        """Count a row whose content was read before."""
        self.duplicates += 1
        self._remember("duplicates", where)

    def _remember(self, name: str, where: str) -> None:
        places = self.places.setdefault(name, [])
        if len(places) < _PLACES:
            places.append(where)

    def _located(self, name: str, count: int, share: str = "") -> str:
        places = self.places.get(name, [])
        more = ", ..." if count > len(places) else ""
        return f"{name}: {count}{share}" + (f" ({', '.join(places)}{more})" if places else "")

    def lines(self) -> list[str]:
        """For printing: a summary and one line per peculiarity."""
        more_pairs = (
            f" (and {self.extra} pairs more, from several answers a row)" if self.extra else ""
        )
        lines = [
            *self.notes,
            *self.shapes,
            f"{self.read} rows read{more_pairs}: {self.kept} kept, {self.elsewhere} belong to "
            f"other steps or splits, {self.dropped.total()} dropped, {self.bad_rows} bad",
        ]
        for reason, (count, places) in sorted(self.bad.items()):
            more = ", ..." if count > len(places) else ""
            lines.append(f"bad: {reason}: {count} ({', '.join(places)}{more})")
        lines += [self._located(f"dropped: {what}", n) for what, n in sorted(self.dropped.items())]
        for what, count in sorted(self.truncated.items()):
            of, total = ("answers", self.answers) if what == "answer" else ("prompts", self.kept)
            share = f" = {count / total:.1%} of {total} {of}" if total else ""
            lines.append(self._located(f"truncated: {what}", count, share))
        cut = self.truncated["answer"] / self.answers if self.answers else 0.0
        if cut > CUT_ANSWERS:
            lines.append(
                f"WARNING: {cut:.0%} of the answers are cut, {1 - cut:.0%} have EOS: a model that "
                "learns from them will hardly learn to stop; raise max_length"
            )
        if self.duplicates:
            found = self._located("duplicates", self.duplicates)
            lines.append(f"{found}: kept, and never in two steps")
        return lines

    def check(self, max_bad_rows: int) -> None:
        """Raise DataError if more rows are bad than allowed."""
        if self.bad_rows > max_bad_rows:
            details = "\n  ".join(line for line in self.lines() if " rows read" not in line)
            raise DataError(
                f"{self.bad_rows} of {self.read} rows cannot be used; data.max_bad_rows allows "
                f"{max_bad_rows}. Mend them, map the columns (data.columns), or raise the limit:"
                f"\n  {details}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        counters = {"dropped": dict(self.dropped), "truncated": dict(self.truncated)}
        return {
            **vars(self),
            "bad": {k: [n, list(p)] for k, (n, p) in self.bad.items()},
            **counters,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        """Undo `to_dict` after a trip through JSON."""
        bad = {reason: (int(n), list(places)) for reason, (n, places) in values["bad"].items()}
        counters = {name: Counter(values[name]) for name in ("dropped", "truncated")}
        return cls(**{**values, "bad": bad, **counters})


@dataclass(frozen=True)
class HeldOut:
    """Of the rows of one `prepare`: their number, the different prompts among them
    (`rlhf.data.split.prompt_key`), and how many of these prompts occur in training rows of any
    step; all of them do in a training split."""

    rows: int
    prompts: int
    seen: int

    def line(self) -> str:
        """For printing."""
        if not self.rows:
            return "no held-out rows: nothing is measured"
        seen = "all" if self.seen == self.prompts else self.seen or "none"
        return (
            f"{self.rows} held-out rows with {self.prompts} different prompts, {seen} of them seen "
            "in training"
        )
