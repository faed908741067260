"""The shapes that are known, in the order in which they are tried, with a reader for each."""

from __future__ import annotations

from typing import Any

from rlhf.data.shapes.base import ANSWERS, Context, Example, Kind, Values
from rlhf.data.shapes.combine import answer_of, as_answer, combine, prompt_of, with_system
from rlhf.data.shapes.turns import turns
from rlhf.data.sources.base import BadRow, NoPreference

_ENDS_WITH_USER = "the conversation ends with a user turn: there is no answer to learn"
_TEXT_KEYS = ("text", "content", "answer", "response", "completion", "output")
_SCORE_KEYS = ("score", "overall_score", "rating", "reward")


def _pairs(values: Values, context: Context) -> list[Example]:
    chosen, others = answer_of(values, "chosen", context), values.get("rejected")
    if chosen is None and others is None and values.get("messages") is not None:
        return _conversation(values, context)
    response = answer_of(values, "response", context)
    several = isinstance(others, list) and bool(others) and isinstance(others[0], (str, list))
    examples = []
    for other in (others or []) if several else [others]:
        rejected = as_answer(other, context.name("rejected"))
        answers = {"response": response, "chosen": chosen, "rejected": rejected}
        prompt = prompt_of(values, context)
        if prompt is None and values.get("messages") is not None:
            prompt = _prompt_turns(values, context)
        examples.append(_combined(prompt, answers, values, context))
    return examples


def _prompt_turns(values: Values, context: Context) -> Any:
    found = turns(values["messages"], context.name("messages"))
    return with_system(found, values.get("system") or "")


def _combined(prompt: Any, answers: Values, values: Values, context: Context) -> Example:
    margin, tools = values.get("margin"), values.get("tools") or None
    return combine(prompt, answers, context, margin=margin, tools=tools)


def _single(values: Values, context: Context) -> list[Example]:
    answers = {name: answer_of(values, name, context) for name in ANSWERS}
    return [_combined(prompt_of(values, context), answers, values, context)]


def _conversation(values: Values, context: Context) -> list[Example]:
    if values.get("messages") is None:
        if values.get("prompt") is not None:
            return _single(values, context)
        raise BadRow(f"column {context.name('messages')!r} is missing")
    found = _prompt_turns(values, context)
    tools = values.get("tools") or None
    if found[-1]["role"] != "assistant":
        why = _ENDS_WITH_USER if found[-1]["role"] == "user" else None
        return [Example(found, {}, tools=tools, lacks=why)]
    if len(found) == 1:
        raise BadRow(f"column {context.name('messages')!r}: an answer without a prompt before it")
    return [Example(found[:-1], {"response": found[-1:]}, tools=tools)]


def _labelled(values: Values, context: Context) -> list[Example]:
    key = label_key(values.get("label"))
    if key is None:
        raise BadRow(f"column {context.name('label')!r} is missing")
    meaning = context.labels.get(key)
    if meaning is None:
        raise BadRow(
            f"column {context.name('label')!r} is {key!r}, which has no meaning: "
            f"data.labels.{key}=first, second or tie"
        )
    if meaning == "tie":
        raise NoPreference("a tie: neither answer is better")
    return _better(values, context, "first" if meaning == "first" else "second")


def _scored(values: Values, context: Context) -> list[Example]:
    first, second = (
        number(values.get(slot), context.name(slot)) for slot in ("first_score", "second_score")
    )
    if first == second:
        raise NoPreference("answers rated alike")
    return _better(values, context, "first" if first > second else "second")


def _better(values: Values, context: Context, better: str) -> list[Example]:
    worse = "second" if better == "first" else "first"
    answers = {
        "chosen": answer_of(values, better, context),
        "rejected": answer_of(values, worse, context),
    }
    for slot, name in ((better, "chosen"), (worse, "rejected")):
        if answers[name] is None:
            raise BadRow(f"column {context.name(slot)!r} is missing")
    return [_combined(prompt_of(values, context), answers, values, context)]


def _choice(values: Values, context: Context) -> list[Example]:
    texts = _listed(values, context)
    choice = number(values.get("label"), context.name("label"))
    if choice not in range(len(texts)):
        raise BadRow(f"column {context.name('label')!r} chooses none of {len(texts)} answers")
    return _best_against(texts, [float(i == choice) for i in range(len(texts))], values, context)


def _ranked(values: Values, context: Context) -> list[Example]:
    texts = _listed(values, context)
    items = values["answers"]
    if values.get("scores") is not None:
        marks, sign, column = values["scores"], 1, context.name("scores")
    elif values.get("ranks") is not None:
        marks, sign, column = values["ranks"], -1, context.name("ranks")
    else:
        marks, sign, column = _own_marks(items, context)
    if not isinstance(marks, list) or len(marks) != len(texts):
        raise BadRow(f"column {column!r} is not one number for each of {len(texts)} answers")
    scores = [sign * number(mark, column) for mark in marks]
    return _best_against(texts, scores, values, context)


def _own_marks(items: list[Any], context: Context) -> tuple[list[Any], int, str]:
    """Scores or ranks that stand in the answers themselves."""
    column = context.name("answers")
    for keys, sign in ((_SCORE_KEYS, 1), (("rank",), -1)):
        for key in keys:
            if all(isinstance(item, dict) and item.get(key) is not None for item in items):
                return [item[key] for item in items], sign, f"{column}.{key}"
    raise BadRow(f"column {column!r}: no score and no rank for its answers")


def _listed(values: Values, context: Context) -> list[Any]:
    items, column = values.get("answers"), context.name("answers")
    if not isinstance(items, list) or len(items) < 2:
        raise BadRow(f"column {column!r} is not a list of two or more answers")
    return [as_answer(_unpacked(item), column) for item in items]


def _unpacked(item: Any) -> Any:
    if not isinstance(item, dict) or "role" in item or "from" in item:
        return item
    return next((item[key] for key in _TEXT_KEYS if key in item), item)


def _best_against(
    texts: list[Any], scores: list[float], values: Values, context: Context
) -> list[Example]:
    """The best answer against each one that is worse; answers as good as the best make no pair."""
    best = scores.index(max(scores))
    worse = [i for i, score in enumerate(scores) if score < scores[best]]
    if not worse:
        raise NoPreference("answers rated alike")
    prompt = prompt_of(values, context)
    return [
        _combined(prompt, {"chosen": texts[best], "rejected": texts[i]}, values, context)
        for i in worse
    ]


def label_key(value: Any) -> str | None:
    """A label as `data.labels` names it: small letters, whole numbers without a point."""
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().lower()


def number(value: Any, column: str) -> float:
    """A finite number. Raises BadRow."""
    try:
        found = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if found != found or found in (float("inf"), float("-inf")):
        raise BadRow(f"column {column!r} is not a number")
    return found


_ASK = ("input", "system", "tools")
SHAPES: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "comparisons",
            ("prompt", "answers", "label"),
            _ASK,
            "the answer that is chosen by its position, against each other one",
            _choice,
        ),
        Kind(
            "ranked",
            ("prompt", "answers"),
            ("scores", "ranks", *_ASK),
            "the best answer against each one with a lower score (or a higher rank)",
            _ranked,
        ),
        Kind(
            "labelled_pairs",
            ("first", "second", "label"),
            ("prompt", "margin", *_ASK),
            "the answer that the label prefers as chosen, the other as rejected; ties are dropped",
            _labelled,
        ),
        Kind(
            "scored_pairs",
            ("prompt", "first", "second", "first_score", "second_score"),
            ("margin", *_ASK),
            "the answer with the higher score as chosen; equal scores are dropped",
            _scored,
        ),
        Kind(
            "pairs",
            ("chosen", "rejected"),
            ("prompt", "messages", "response", "margin", *_ASK),
            "prompt, chosen, rejected; a list of rejected answers gives one pair for each; without "
            "a prompt it is what both answers begin with",
            _pairs,
        ),
        Kind(
            "kto",
            ("label", "messages|response"),
            ("prompt", *_ASK),
            "each row has one answer and a label that says whether it is good; training on the "
            "answers would learn the bad ones too, and there is no KTO here. Build pairs of a good "
            "and a bad answer to one prompt, or keep the good rows alone and add "
            "data.ignore_columns=[{label}]",
            None,
        ),
        Kind(
            "conversation",
            ("messages",),
            ("prompt", "response", "system", "tools"),
            "the last assistant turn as response, the turns before it as prompt",
            _conversation,
        ),
        Kind(
            "alpaca",
            ("prompt", "input", "response"),
            ("chosen", "rejected", "margin", "system", "tools"),
            "instruction + input -> prompt, joined by a line break; output -> response",
            _single,
        ),
        Kind(
            "prompt_completion",
            ("prompt", "response"),
            ("chosen", "rejected", "margin", "system", "tools"),
            "prompt and one answer",
            _single,
        ),
        Kind(
            "prompts",
            ("prompt",),
            ("chosen", "rejected", "margin", *_ASK),
            "a prompt alone (or with one of chosen and rejected)",
            _single,
        ),
    )
}
