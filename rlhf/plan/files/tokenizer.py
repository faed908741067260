"""A tokenizer's files: JSON of the right kinds, and no more tokens than the model has rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.plan.files.fault import AGAIN, Fault, Rule, broken, is_count, read_object, shown

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
              "sentencepiece.bpe.model", "tekken.json")  # fmt: skip
_LARGE = 40 * 10**6  # bytes: reading more takes seconds
MAX_TEMPLATE_BYTES = 10**6
_KINDS = ("BPE", "Unigram", "WordLevel", "WordPiece")


def _is_token(value: Any) -> bool:
    named = isinstance(value, dict) and isinstance(value.get("content"), str)
    return isinstance(value, str) or named


def _are_tokens(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_token, value)))


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(
            isinstance(one, dict)
            and isinstance(one.get("name"), str)
            and isinstance(one.get("template"), str)
            for one in value
        )
    if isinstance(value, dict):
        return all(isinstance(text, str) for text in value.values())
    return value is None or isinstance(value, str)


def _are_added(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and len(key) < 10 and isinstance(token, dict) and _is_token(token)
        for key, token in value.items()
    )


_SIDE = Rule(lambda value: value in ("left", "right", None), '"left" or "right"')
_SPECIAL = {
    f"{name}_token": Rule(
        lambda value: value is None or _is_token(value), 'text, or an object with text in "content"'
    )
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
} | {
    "additional_special_tokens": Rule(_are_tokens, "a list of tokens"),
    "extra_special_tokens": Rule(
        lambda v: _are_tokens(list(v.values()) if isinstance(v, dict) else v),
        "a list of tokens, or an object of them",
    ),
}
_CONFIG = _SPECIAL | {
    "chat_template": Rule(_is_template, "text, or a list of objects with name and template"),
    "added_tokens_decoder": Rule(_are_added, 'ids with objects that have text in "content"'),
    "tokenizer_class": Rule(lambda v: v is None or isinstance(v, str), "the name of a class"),
    "model_max_length": Rule(
        lambda v: (isinstance(v, (int, float)) and v > 0) or v is None, "a number above 0"
    ),
    "padding_side": _SIDE,
    "truncation_side": _SIDE,
}


def tokenizer_faults(place: Path, config: Mapping[str, Any]) -> Iterator[Fault]:
    """What is broken in the tokenizer's files of a directory. `config` is its config.json's."""
    yield from _main_file(place / "tokenizer.json", config)
    for name, rules in (
        ("tokenizer_config.json", _CONFIG),
        ("special_tokens_map.json", _SPECIAL),
        ("added_tokens.json", {}),
    ):
        if (place / name).exists():
            content = read_object(place / name)
            if isinstance(content, Fault):
                yield content
                continue
            yield from broken(name, content, rules)
            if name == "added_tokens.json" and not all(map(_is_id, content.values())):
                yield Fault(f"{name} is no table of ids", "a token and its id, a whole number")
    yield from _template(place / "chat_template.jinja")


def _is_id(value: Any) -> bool:
    return is_count(value, 0)


def _main_file(file: Path, config: Mapping[str, Any]) -> Iterator[Fault]:
    """Added tokens get rows of their own; the tokens of the vocabulary itself must have some."""
    if not file.exists() or (file.is_file() and file.stat().st_size > _LARGE):
        return
    content = read_object(file)
    needed = "a tokenizer of Hugging Face's"
    if isinstance(content, Fault):
        yield Fault(content.found, needed)
        return
    model, added = content.get("model"), content.get("added_tokens")
    model = model if isinstance(model, dict) else {}
    vocab = model.get("vocab")
    if not isinstance(vocab, (dict, list)):
        yield Fault(f"{file.name}: model.vocab is {shown(vocab)}", needed)
        return
    if model.get("type", "BPE") not in _KINDS:
        yield Fault(
            f"{file.name}: model.type is {shown(model['type'])}", f"one of {', '.join(_KINDS)}"
        )
    if isinstance(vocab, dict) and not all(map(_is_id, vocab.values())):
        wrong = next(token for token, number in vocab.items() if not _is_id(number))
        yield Fault(f"{file.name}: the id of {shown(wrong)} is {shown(vocab[wrong])}", "a number")
        return
    added = [] if added is None else added
    if not isinstance(added, list) or not all(
        isinstance(one, dict) and isinstance(one.get("content"), str) and _is_id(one.get("id"))
        for one in added
    ):
        rule = 'a list of objects with text in "content" and a number in "id"'
        yield Fault(f"{file.name}: added_tokens is {shown(added)}", rule)
        return
    yield from _rows(file, vocab, added, config)


def _rows(file: Path, vocab: Any, added: list[Any], config: Mapping[str, Any]) -> Iterator[Fault]:
    """Every id of the vocabulary has a row of the embeddings; added tokens get rows of their own,
    one after the other."""
    inner = config.get("text_config") or config
    rows = inner.get("vocab_size")
    remedy = "give the tokenizer that belongs to this model"
    if not is_count(rows):
        return
    if len(vocab) > rows:
        found = f"its tokenizer has {len(vocab):,} tokens, its embeddings have {rows:,} rows"
        yield Fault(found, "a row for each token (vocab_size in config.json)", remedy)
        return
    last = max(vocab, key=vocab.__getitem__) if isinstance(vocab, dict) and vocab else None
    if last is not None and vocab[last] >= rows:
        found = f"{file.name}: the id of {shown(last)} is {vocab[last]}"
        yield Fault(found, f"ids below {rows:,} (vocab_size in config.json)", remedy)
    for one in added:
        if one["id"] >= rows + len(added):
            found = f"{file.name}: the id of the added token {shown(one['content'])} is {one['id']}"
            yield Fault(found, f"ids below {rows + len(added):,}", remedy)
            return


def _template(file: Path) -> Iterator[Fault]:
    if not file.exists():
        return
    needed = f"a Jinja template in UTF-8 of at most {MAX_TEMPLATE_BYTES:,} bytes"
    try:
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            yield Fault(f"{file.name} has {file.stat().st_size:,} bytes", needed)
            return
        file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        yield Fault(f"{file.name} is not readable: {error}", needed, AGAIN)
