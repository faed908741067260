"""What the checks before a start ask, in a process of its own: a user's module may do anything.

python -m rlhf.rewards '{"judge": "module:function", "terms": [...], "keep": [...]}'
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rlhf.config.rewards import RewardTerm
from rlhf.errors import ConfigError, UserError
from rlhf.rewards.judges import resolve_judge
from rlhf.rewards.terms import check_terms, offered_columns, resolve_reward


def problem_with(asked: dict[str, Any]) -> tuple[str, int]:
    """(why judge or rewards cannot be used, exit code); ("", 0) if they can."""
    keep = list(asked.get("keep") or [])
    try:
        if name := asked.get("judge"):
            resolve_judge(name).score.refuse_missing(offered_columns(keep), "judge")
        terms = [RewardTerm(**term) for term in asked.get("terms") or []]
        check_terms(terms, keep)
        for function in map(resolve_reward, terms):
            if function.reach is not None:
                function.reach()
    except UserError as error:
        return str(error), error.exit_code
    except (Exception, SystemExit) as error:  # noqa: BLE001  a user's module may raise anything
        names = asked.get("judge") or ", ".join(t["use"] for t in asked.get("terms") or [])
        why = f"importing {names} raises {type(error).__name__}: {error}"
        return why, ConfigError.exit_code
    return "", 0


if __name__ == "__main__":
    with open(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)  # what a user's module prints is not part of the answer
        found = problem_with(json.loads(sys.argv[1]))
        answer.write(json.dumps({"problem": found[0], "exit_code": found[1]}))
