"""The terms of step 3's reward, from the settings to functions."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from functools import partial

from rlhf.config.keys import nearest
from rlhf.config.rewards import MODEL, RewardTerm
from rlhf.errors import ConfigError
from rlhf.rewards.functions import ENDED, RewardFunction, imported, reward_function
from rlhf.rewards.shipped import SHIPPED


def resolve_reward(term: RewardTerm) -> RewardFunction:
    """The function of a term that is not the reward model.

    Raises ConfigError: an unknown name, options that it does not take, nothing callable. What a
    user's module raises is not caught.
    """
    module_name, _, attribute = term.use.partition(":")
    if term.use in SHIPPED:
        make = SHIPPED[term.use]
        _check_options(term, make)
        return make(**term.options)
    if not module_name or not attribute:
        names = [MODEL, *SHIPPED]
        close = nearest(term.use, names)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"reward {term.use!r}: unknown. {hint}Choose one of {', '.join(names)}, or your own as "
            "module:function"
        )
    function = imported(term.use, "reward")
    if term.options:
        _check_options(term, function)
        function = partial(function, **term.options)
    found = reward_function(term.use, function, "reward")
    if term.options:  # a partial's keywords are still parameters of its signature
        needs = tuple(name for name in found.needs if name not in term.options)
        may = found.may and tuple(name for name in found.may if name not in term.options)
        return RewardFunction(term.use, function, needs, may)
    return found


def offered_columns(keep: Sequence[str]) -> list[str]:
    """What functions can ask for, with data.keep_columns."""
    return [ENDED, *keep]


def check_terms(terms: Sequence[RewardTerm], keep: Collection[str]) -> None:
    """Raises ConfigError for a term that cannot be asked, before anything is trained."""
    for term in terms:
        if term.use != MODEL:
            resolve_reward(term).refuse_missing(offered_columns(list(keep)), "reward")


def _check_options(term: RewardTerm, make: object) -> None:
    try:
        signature = inspect.signature(make)  # type: ignore[arg-type]
        if term.use in SHIPPED:
            signature.bind(**term.options)
        else:
            signature.bind_partial(**term.options)
    except TypeError as error:
        raise ConfigError(
            f"reward {term.use!r}: options {term.options}: {error}; it takes {signature}"
        ) from None
    except ValueError:  # a builtin without a signature
        return
