"""Stop strings: which token completes one.

An answer ends at the first token after which the decoded answer contains a stop string. Decoding
is Python work, so a table over the vocabulary first picks the few tokens that could complete one:
their text contains the last character of a stop string, or a fragment of a character.
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
