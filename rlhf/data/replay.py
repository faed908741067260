"""An endless stream of batches that can be set to where an earlier one had come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Replayable(Generic[T]):
    """`make(skipped)` gives the stream without its first `skipped` items, without making them.

    `items`: how many items are in so many of those that states of earlier releases count.
    """

    def __init__(
        self, make: Callable[[int], Iterator[T]], *, items: Callable[[int], int] = int
    ) -> None:
        self._make, self._taken, self._items = make, 0, items
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
        self._taken = state["items"] if "items" in state else self._items(state["taken"])
        self._stream = None
