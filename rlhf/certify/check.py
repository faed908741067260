"""What a check of the certificate is: a measured value and the bound that it must keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """`value` must be at most `bound`; a value that is no number keeps no bound."""

    name: str
    value: float
    bound: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        return self.value <= self.bound

    def line(self) -> str:
        verdict = "ok  " if self.holds else "FAIL"
        unit = f" {self.unit}" if self.unit else ""
        return f"{verdict} {self.name}: {self.value:.5f}{unit}, at most {self.bound:g}"


Group = Callable[[], Iterable[Check]]
"""Checks that share work; each is yielded as soon as it is known."""
