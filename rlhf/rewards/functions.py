"""A reward is a function: score(prompts, answers, **columns) -> one number per answer.

Whatever scores answers by code has this form: the rewards that ship with the project, a user's own
`module:function`, and judges, which are rewards that nobody trains on. Imports nothing heavy.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.keys import nearest
from rlhf.errors import ConfigError

ENDED = "ended"  # the column that is always there: did each answer stop by itself?
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class RewardFunction:
    """A named function of prompts, answers and the columns that it asks for.

    needs: columns without which it cannot be called; may: those that it takes where they are there;
    None: all of them. reach: raises RequirementError if something outside that it asks is not
    there; it costs nothing, and is called once before the start.
    """

    name: str
    function: Callable[..., Any]
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] | None = None
    reach: Callable[[], None] | None = None

    def __call__(
        self, prompts: Sequence[str], answers: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Any:
        """What the function returns, unchecked (`asking.asked` checks it). It gets lists."""
        known = columns.keys() if self.may is None else {*self.needs, *self.may}
        given = {name: list(values) for name, values in columns.items() if name in known}
        return self.function(list(prompts), list(answers), **given)

    def refuse_missing(self, offered: Collection[str], what: str) -> None:
        """Raises ConfigError for a column that it needs and that it will not be given."""
        for name in self.needs:
            if name not in offered:
                raise ConfigError(
                    f"{what} {self.name!r} needs {name!r} and is given {', '.join(offered)}: keep "
                    f"that column of the data with data.keep_columns=[{name}], or give the "
                    "parameter a default"
                )


def reward_function(name: str, function: Callable[..., Any], what: str) -> RewardFunction:
    """The columns that a function asks for are its parameters after prompts and answers.

    Raises ConfigError for a function that cannot take prompts and answers.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # builtins without a signature
        return RewardFunction(name, function)
    kinds = [parameter.kind for parameter in parameters]
    positional = [k for k in kinds if k in (_BY_NAME[0], inspect.Parameter.POSITIONAL_ONLY)]
    takes_any = inspect.Parameter.VAR_POSITIONAL in kinds
    rest = [p for p in parameters[2:] if p.kind in _BY_NAME]
    only_by_place = [p for p in parameters[2:] if p.kind == inspect.Parameter.POSITIONAL_ONLY]
    if (len(positional) < 2 and not takes_any) or any(
        p.default is inspect.Parameter.empty for p in only_by_place
    ):
        raise ConfigError(
            f"{what} {name!r}: it must be a function of (prompts, answers, ...), where further "
            f"parameters are named like columns, and it is {name.rpartition(':')[2]}"
            f"{inspect.signature(function)}"
        )
    needs = tuple(p.name for p in rest if p.default is inspect.Parameter.empty)
    may = None
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        may = tuple(p.name for p in rest if p.name not in needs)
    return RewardFunction(name, function, needs, may)


def imported(name: str, what: str) -> Callable[..., Any]:
    """What `module:function` names.

    Raises ConfigError for a path that leads to nothing callable. What the module itself raises is
    not caught.
    """
    module_name, _, attribute = name.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != module_name and not module_name.startswith(f"{missing}."):
            raise  # the module exists and lacks something of its own: its traceback says what
        raise ConfigError(
            f"{what} {name!r}: no module {missing!r}; it must be importable from the "
            "working directory or PYTHONPATH"
        ) from None
    for part in attribute.split("."):
        if not hasattr(target, part):
            close = nearest(part, [n for n in dir(target) if callable(getattr(target, n, None))])
            hint = f". Did you mean {module_name}:{close[0]}?" if close else ""
            raise ConfigError(f"{what} {name!r}: {module_name} has no {attribute!r}{hint}")
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(
            f"{what} {name!r}: {attribute!r} is a {type(target).__name__}, no function"
        )
    return target
