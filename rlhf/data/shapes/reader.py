"""All rows of one data set, by its shape; what the first rows did not show is still refused."""

from __future__ import annotations

import json
from typing import Any

from rlhf.config.schema import DataConfig
from rlhf.data.shapes.base import MEANING, Example
from rlhf.data.shapes.combine import repeats, without_prompt
from rlhf.data.shapes.detect import Shape, mixed, unused_column
from rlhf.data.sources.base import BadRow, Row
from rlhf.errors import DataError


class Reader:
    """Reads row after row; `finish` after the last one."""

    def __init__(self, shape: Shape, data: DataConfig) -> None:
        self.shape = shape
        self._auto = data.prompt_in_answers == "auto"
        self._unused = list(shape.unused)
        self._known = set(shape.known)
        self._watched = set(shape.watched)
        self._repeated = self._judged = 0

    def __call__(self, row: Row) -> list[Example]:
        """The row's examples. Raises BadRow, and DataError for a column that changes the meaning
        and came later than the first rows."""
        self._look_at_columns(row)
        examples = self.shape.read(row)
        if any(one.tools and isinstance(one.prompt, str) for one in examples):
            raise DataError(
                unused_column("tools", self.shape.kind, self.shape.source, sorted(self._known))
            )
        if self._auto:
            for one in examples:
                found = repeats(one)
                self._judged += found is not None
                self._repeated += found is True
        return [without_prompt(one) for one in examples] if self.shape.strip else examples

    def kept(self, row: Row) -> dict[str, Any]:
        """The row's values in the columns of data.keep_columns, None where it lacks one.

        Raises BadRow: what is there cannot be written as JSON.
        """
        found = {name: row.get(name) for name in self.shape.kept}
        for name, value in found.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError, RecursionError):
                raise BadRow(
                    f"column {name!r} is to be kept (data.keep_columns) and holds a "
                    f"{type(value).__name__}, which is no text, number, list or mapping"
                ) from None
        return found

    def finish(self) -> list[str]:
        """The lines of the report. Raises DataError: some answers begin with the prompt, others do
        not."""
        if self._repeated not in (0, self._judged) or (self._repeated and not self.shape.strip):
            raise DataError(mixed(self.shape.source, self._repeated, self._judged))
        lines = self.shape.lines()
        late = [name for name in self._unused if name not in self.shape.unused]
        return [*lines, *([f"not used either: {', '.join(late)}"] if late else [])]

    def _look_at_columns(self, row: Row) -> None:
        if row.keys() - self._known:
            new = [name for name in row if name not in self._known]
            self._known.update(new)
            self._unused += new
            self._watched.update(name for name in new if name in MEANING)
        for name in self._watched:
            if row.get(name) not in (None, "", [], {}):
                raise DataError(
                    unused_column(name, self.shape.kind, self.shape.source, sorted(self._known))
                )
