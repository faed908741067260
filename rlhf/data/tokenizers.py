"""Tokenizers made fit for training: pad is never eos; text to ids without surprises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rlhf.data.sources.base import sha256
from rlhf.data.templates import prepends_bos, template_bos, template_text
from rlhf.data.typed import GUARD, SpecialTokens, unguarded
from rlhf.errors import ConfigError

_PADS = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
_NEW_PAD = "<|pad|>"


def prepare_tokenizer(tokenizer: Any) -> int:
    """Give the tokenizer a pad token that is not its eos; return how many tokens were added (0, 1).

    A pad token that differs from eos stays. Otherwise an unused special token of the vocabulary is
    taken (SmolLM2: `<|endoftext|>`, as its eos is `<|im_end|>`), or `<|pad|>` is added; the
    embeddings may then have to grow. ALGORITHM.md 1. Raises ConfigError: no eos token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the tokenizer has no eos token: answers could never end; set one")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != eos:
        return 0
    vocabulary = tokenizer.get_vocab()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    taken = {eos, tokenizer.bos_token_id}
    for token in _PADS:
        if token in special and vocabulary.get(token, eos) not in taken:
            tokenizer.pad_token = token
            return 0
    before = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": _NEW_PAD})
    return len(tokenizer) - before


def fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides which ids a text becomes, added tokens included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Left behind by whoever called the tokenizer last; we never rely on them.
        state["truncation"] = state["padding"] = None
    else:
        added = {str(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "added": added}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return sha256(json.dumps([state, special], sort_keys=True))


class Encoder:
    """Prompts and answers to ids, by one rule for all steps.

    A prompt's ids are those of its text after the template's bos, if that has one: the ids that
    `tokenizer.apply_chat_template` gives. An answer's ids are those of its text alone, never with
    a bos, up to and including one eos. A special token that `special` has marked as typed
    (typed.py) is encoded as text.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self.template = template_text(tokenizer, template)
        self.bos = template_bos(tokenizer, self.template)
        self.plain_bos = self.bos if prepends_bos(tokenizer) else ""
        self.eos_id: int = tokenizer.eos_token_id
        self.eos: str = tokenizer.eos_token
        self.special = SpecialTokens(tokenizer)
        self._drop_space = self._adds_space()

    def prompt_text(self, prompt: str, *, plain: bool = False) -> str:
        """The text that is tokenised: the prompt with the bos before it, once.

        A conversation's is the template's. A plain text gets one only if the tokenizer puts it
        there by itself, too: where bos is `<|im_start|>`, it begins a turn.
        """
        bos = self.plain_bos if plain else self.bos
        return prompt if bos and prompt.startswith(bos) else bos + prompt

    def prompts(self, texts: Sequence[str], plain: Sequence[bool] = ()) -> list[list[int]]:
        """Ids of each prompt; `plain`: which ones no template wrote (default: none)."""
        kinds = plain or [False] * len(texts)
        return self.ids(
            [self.prompt_text(text, plain=one) for text, one in zip(texts, kinds, strict=True)]
        )

    def text(self, ids: list[int]) -> str:
        """The text of ids, special tokens included."""
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each answer, ended by one eos id; what a template adds after eos is left off."""
        if self._drop_space:
            texts = [text.removeprefix(" ") for text in texts]
        return [self._ended(ids) for ids in self.ids(texts)]

    def _ended(self, ids: list[int]) -> list[int]:
        end = ids.index(self.eos_id) if self.eos_id in ids else len(ids)
        return [*ids[:end], self.eos_id]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, nothing added."""
        if not texts:
            return []
        typed = {i: self._ids_around(text) for i, text in enumerate(texts) if GUARD in text}
        found = self._encode(["" if i in typed else text for i, text in enumerate(texts)])
        return [typed.get(i, ids) for i, ids in enumerate(found)]

    def _ids_around(self, text: str) -> list[int]:
        """Ids of a text with typed special tokens."""
        pieces = self.special.pieces(text)
        # `split_special_tokens`: transformers' name for "spell special tokens out".
        plain = self._encode([unguarded(piece) for piece in pieces[::2]], split_special_tokens=True)
        ids = list(plain[0])
        for token, after in zip(pieces[1::2], plain[1:], strict=True):
            ids += [self.special.ids[token], *after]
        return ids

    def _encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        found = self._tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            verbose=False,
            **options,
        )
        return found.input_ids

    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space before every text (SentencePiece's dummy prefix).

        Then an answer " yes" would follow its prompt with two spaces.
        """
        colon, plain, spaced = self.ids(["a:", "b", " b"])
        decode = self._tokenizer.decode
        if decode(colon + spaced).endswith("a: b"):
            return False
        return decode(colon + plain).endswith("a: b")
