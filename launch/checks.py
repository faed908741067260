"""One check, one line: what, found, needed, remedy; and what follows from those that fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf.errors import ConfigError, RequirementError, UserError

State = Literal["ok", "warn", "FAIL"]
BAD_SETTING, MISSING = ConfigError.exit_code, RequirementError.exit_code


@dataclass(frozen=True)
class Check:
    what: str
    state: State
    found: str
    needed: str = ""
    remedy: str = ""
    exit_code: int = MISSING
    """Of a check that fails: 2, a setting is wrong; 3, something is missing."""

    def line(self) -> str:
        text = f"{self.state:4} {self.what}: {self.found}"
        if self.needed:
            text += f" (needed: {self.needed})"
        return text + (f" -> {self.remedy}" if self.remedy and self.state != "ok" else "")


def judge(
    what: str,
    good: bool,
    found: str,
    needed: str,
    remedy: str,
    *,
    fatal: bool = True,
    exit_code: int = MISSING,
) -> Check:
    """A check that holds, or does not."""
    state: State = "ok" if good else "FAIL" if fatal else "warn"
    return Check(what, state, found, needed, remedy, exit_code)


def of_error(what: str, error: UserError) -> Check:
    """A failed check from an error, which says what was found and what to do."""
    return Check(what, "FAIL", str(error), exit_code=error.exit_code)


def problem(checks: Sequence[Check]) -> UserError | None:
    """One error for all checks that failed; None where all hold. A wrong setting (exit code 2)
    counts before something missing (3): what is missing may be another thing once it is right."""
    failed = [check for check in checks if check.state == "FAIL"]
    if not failed:
        return None
    kind = ConfigError if any(check.exit_code == BAD_SETTING for check in failed) else None
    lines = "\n".join(f"  {check.line()}" for check in failed)
    text = f"{len(failed)} of {len(checks)} checks failed before the start:\n{lines}"
    return (kind or RequirementError)(text)
