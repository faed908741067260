"""Does a faster attention compute what the model's own does? Tried on a few tokens, once a model.

Some families ask in their forward whether their attention is called "sdpa", and do something else
under any other name: Falcon then builds no causal mask. What a class does is found out, not listed.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rlhf.engine import comm
from rlhf.engine.zero3 import is_sharded
from rlhf.models.families import takes_position_ids

Naming = Callable[[Any, str], Any]
_ASKS = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)")
_ROWS, _LENGTH, _PADS = 2, 12, 4
_ALLOWED = {torch.float32: 1e-4}  # share of the hidden states' norm, beside rounding
_ALLOWED_IN_HALF = 2e-2
_found: WeakKeyDictionary[Any, dict[tuple[str, torch.dtype], bool]] = WeakKeyDictionary()
_said: set[str] = set()


def attention_fits(decoder: Any, name: str, named: Naming) -> bool:
    """Whether the attention called `name` may stand in for the decoder's own.

    Equal to `eager` within rounding, with and without left padding, and blind to later tokens. A
    sharded model cannot be tried alone: its modelling file is read instead.

    Args:
        named: context manager that renames the decoder's attention (attention.py).
    """
    key, known = (name, next(decoder.parameters()).dtype), _found.setdefault(decoder, {})
    if key not in known:
        if is_sharded(decoder.parameters()):
            known[key] = not asks_for_its_name(type(decoder))
        else:
            known[key] = _tried(decoder, name, named)
        if not known[key]:
            say(f"{type(decoder).__name__}: our faster attention does not fit it; it uses its own")
    return known[key]


def asks_for_its_name(kind: type) -> bool:
    """Whether the class's modelling file compares the name of the attention with something."""
    try:
        return bool(_ASKS.search(inspect.getsource(sys.modules[kind.__module__])))
    except (OSError, TypeError, KeyError):
        return True  # no source to read


def say(line: str) -> None:
    """One line, once, from one process."""
    if line not in _said and comm.rank() == 0:
        _said.add(line)
        print(line, flush=True)


@contextmanager
def quiet(model: Any) -> Iterator[None]:
    """No gradients and no dropout inside; each submodule's mode is back after."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def probe_ids(model: Any, length: int = _LENGTH) -> Tensor:
    """(2, length) int64 different ids that the model has."""
    rows = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    return (torch.arange(_ROWS * length, device=device).view(_ROWS, length) * 7 + 3) % rows


def _tried(decoder: Any, name: str, named: Naming) -> bool:
    ids = probe_ids(decoder)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % (int(ids.max()) + 1)
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[0, :_PADS] = 0
    allowed = _ALLOWED.get(next(decoder.parameters()).dtype, _ALLOWED_IN_HALF)
    with quiet(decoder):
        for given in (None, padded):
            try:
                own = _hidden(decoder, ids, given)
                with named(decoder, "eager"):
                    eager = _hidden(decoder, ids, given)
                    own_leak = _apart(_hidden(decoder, other, given)[:, :-1], eager[:, :-1], given)
                with named(decoder, name):
                    ours = _hidden(decoder, ids, given)
                    leak = _apart(_hidden(decoder, other, given)[:, :-1], ours[:, :-1], given)
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
                return False
            rounding = _apart(own, eager, given)
            # Rounding moves where experts are chosen: allowed as far as eager itself is moved.
            if not _apart(ours, eager, given) <= allowed + 2 * rounding:
                return False
            if not leak <= 1e-3 * allowed + 2 * own_leak:
                return False
    return True


def _hidden(decoder: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    whole = torch.ones_like(ids) if mask is None else mask
    extra = {}
    if takes_position_ids(decoder):
        extra["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)
    output = decoder(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
    return output.last_hidden_state.float()


def _apart(a: Tensor, b: Tensor, mask: Tensor | None) -> float:
    """Norm of the difference at real positions, as a share of b's."""
    if mask is not None:
        real = mask[:, : a.shape[1]].bool()
        a, b = a[real], b[real]
    return float((a - b).norm() / b.norm().clamp(min=1e-12))
