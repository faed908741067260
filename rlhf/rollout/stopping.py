"""Stop strings: which token completes one, and the answer without it.

An answer ends at the first token after which the decoded answer contains a stop string. Decoding
is Python work, so a table over the vocabulary first picks the few tokens that could complete one:
their text contains the last character of a stop string, or a fragment of a character.

Such an answer has two forms (ALGORITHM.md 16). What was *sampled*, up to the token that completed
the stop string, is what the policy did: those tokens have log-probs, KL and advantages. What is
*read*, by the reward model and everybody who judges, is the text before the stop string and EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import ConfigError

_FRAGMENT = "\ufffd"


class StopStrings:
    """Finds stop strings in answers; nothing is ever found if `stop` is empty."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        if any(not text for text in stop):
            raise ConfigError(
                f"stop strings {list(stop)!r}: remove the empty one, it ends every answer"
            )
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._table: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self._stop)

    def completed(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """(B,) bool: does the last of the first `counts` (B,) tokens of `tokens` (B, A) complete
        a stop string? Earlier tokens are taken not to have completed one."""
        last = tokens.gather(1, counts[:, None] - 1).squeeze(1)
        found = torch.zeros_like(last, dtype=torch.bool)
        for row in self._candidates(last).nonzero().flatten().tolist():
            found[row] = self._contains(tokens[row, : int(counts[row])])
        return found

    def first_ends(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B,) int64: the number of tokens up to the one that completes a stop string within
        the first `lengths` (B,) tokens; 0 where none does."""
        ends = torch.zeros_like(lengths)
        candidates = self._candidates(tokens).cpu()
        for row, length in enumerate(lengths.tolist()):
            for position in candidates[row, :length].nonzero().flatten().tolist():
                if self._contains(tokens[row, : position + 1]):
                    ends[row] = position + 1
                    break
        return ends

    def read(self, tokens: list[int], eos: int, limit: int) -> list[int] | None:
        """The tokens as they are read: those whose text ends before the stop string, then EOS.

        `tokens`: a sampled answer whose last token completed a stop string. Where the stop string
        begins inside a token, that token's text before it is encoded anew, and, should that not
        give the same text, all of it. None if the result has more than `limit` tokens: there was
        no room left for an end.
        """
        text = self._decode(tokens)
        text = text[: min(at for stop in self._stop if (at := text.find(stop)) >= 0)]
        count = len(tokens) - 1
        while count and not text.startswith(self._decode(tokens[:count])):
            count -= 1
        kept = tokens[:count]
        rest = text[len(self._decode(kept)) :]
        if rest:
            kept = kept + self._encode(rest)
            if self._decode(kept) != text:
                kept = self._encode(text)
        return [*kept, eos] if len(kept) < limit else None

    def _encode(self, text: str) -> list[int]:
        """Text as text: a special token's name in it is no special token."""
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return ids

    def _contains(self, tokens: Tensor) -> bool:
        text = self._decode(tokens.tolist())
        return any(stop in text for stop in self._stop)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _candidates(self, tokens: Tensor) -> Tensor:
        if self._table is None:
            self._table = self._build_table()
        if self._table.device != tokens.device:
            self._table = self._table.to(tokens.device)
        # Embeddings may be padded beyond the tokenizer: those ids have no text.
        known = tokens < len(self._table)
        return known & self._table[tokens.clamp(max=len(self._table) - 1)]

    def _build_table(self) -> Tensor:
        """(vocabulary,) bool. Each token is decoded alone and after another token: some
        tokenizers drop a leading space at the start of a text."""
        size = len(self._tokenizer)
        anchor = next((i for i in range(size) if self._decode([i]).strip().isalnum()), 0)
        start = self._decode([anchor])
        marks = {text[-1] for text in self._stop} | {_FRAGMENT}
        table = torch.zeros(size, dtype=torch.bool)
        for i in range(size):
            alone, after = self._decode([i]), self._decode([anchor, i])
            table[i] = any(m in alone or after.count(m) > start.count(m) for m in marks)
        return table
