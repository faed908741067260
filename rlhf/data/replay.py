"""An endless stream of batches that can be set to where an earlier one had come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Replayable(Generic[T]):
    """`make(skipped)` gives the stream without its first `skipped` items, without making them.

    `unit`: items in one of those that states of earlier releases count, as `taken`.
    """

    def __init__(self, make: Callable[[int], Iterator[T]], *, unit: int = 1) -> None:
        self._make, self._taken, self._unit = make, 0, unit
        self._stream: Iterator[T] | None = None

    def __iter__(self) -> Replayable[T]:
        return self

    def __next__(self) -> T:
        if self._stream is None:
            self._stream = self._make(self._taken)
        item = next(self._stream)
        self._taken += 1
        return item

    def state_dict(self) -> dict[str, Any]:
        return {"items": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        items = state["items"] if "items" in state else state["taken"] * self._unit
        self._taken, self._stream = int(items), None
