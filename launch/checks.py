"""One check, one line: what, found, needed, remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rlhf.errors import RequirementError

State = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Check:
    what: str
    state: State
    found: str
    needed: str = ""
    remedy: str = ""

    def line(self) -> str:
        text = f"{self.state:4} {self.what}: {self.found}"
        if self.needed:
            text += f" (needed: {self.needed})"
        return text + (f" -> {self.remedy}" if self.remedy and self.state != "ok" else "")


def judge(
    what: str, good: bool, found: str, needed: str, remedy: str, *, fatal: bool = True
) -> Check:
    """A check that holds, or does not."""
    state: State = "ok" if good else "FAIL" if fatal else "warn"
    return Check(what, state, found, needed, remedy)


def refuse(checks: Iterable[Check], count: str) -> None:
    """Raises RequirementError with every check that failed."""
    failed = [check for check in checks if check.state == "FAIL"]
    if failed:
        lines = "\n".join(f"  {check.line()}" for check in failed)
        raise RequirementError(f"{len(failed)} of {count} failed before the start:\n{lines}")
