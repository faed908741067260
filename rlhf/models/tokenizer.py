"""Loading a tokenizer and making it fit for all three steps."""

from __future__ import annotations

import tempfile
from typing import Any

from transformers import AutoTokenizer

from rlhf.data.templates import apply_template
from rlhf.data.tokenizers import prepare_tokenizer
from rlhf.errors import RequirementError
from rlhf.models.loading import explain_load_errors
from rlhf.store import tokenizer_fingerprint


def load_tokenizer(name: str, *, template: str | None, trust_remote_code: bool = False) -> Any:
    """Reads a tokenizer; gives it a pad token that is not eos, and the run's chat template.

    `template` None keeps the one it has (a parent artifact's). It pads on the left, as generation
    needs; our own batches do not use its padding. Raises RequirementError: it cannot be read, or
    has no tokenizer.json.
    """
    with explain_load_errors(name, "tokenizer", trusted=trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise RequirementError(
            f"model {name!r}: {type(tokenizer).__name__} is a slow tokenizer, without "
            "tokenizer.json, which every artifact needs. If the model has a fast one, save it: "
            f"AutoTokenizer.from_pretrained({name!r}, use_fast=True).save_pretrained(DIR) with "
            "sentencepiece or tiktoken installed, and name that directory; else use a model that "
            "has tokenizer.json"
        )
    prepare_tokenizer(tokenizer)
    if template is not None:
        apply_template(tokenizer, template)
    tokenizer.padding_side = "left"
    return tokenizer


def fingerprint(tokenizer: Any) -> str:
    """Of what decides a text's ids, as the manifests have it."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return tokenizer_fingerprint(scratch)
