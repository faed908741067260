"""Do two tokenizers mean the same by the same ids?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.errors import ArtifactError
from rlhf.store.jsonio import fingerprint


def tokenizer_fingerprint(directory: Path | str) -> str:
    """sha256 (hex) of the vocabulary, the merges and the special tokens in `tokenizer.json`.

    Chat template, padding and truncation settings do not count: they change no id's meaning.
    Raises ArtifactError if there is no `tokenizer.json` or it is not one.
    """
    path = Path(directory) / "tokenizer.json"
    remedy = (
        "save the model's fast tokenizer there: "
        f"AutoTokenizer.from_pretrained(NAME).save_pretrained({str(directory)!r})"
    )
    try:
        content = json.loads(path.read_bytes())
        return fingerprint(_meaning(content))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: not a tokenizer ({error!r}); {remedy}") from error


def _meaning(content: dict[str, Any]) -> dict[str, Any]:
    """What gives ids their meaning, in the same form whichever library version wrote the file."""
    model = content["model"]
    vocab = model["vocab"]
    scores = None
    if isinstance(vocab, list):  # unigram: [[token, score], ...], the id is the position
        scores = [score for _, score in vocab]
        vocab = {token: number for number, (token, _) in enumerate(vocab)}
    added = content.get("added_tokens") or []
    return {
        # A token added later may be written into the vocabulary, or only beside it.
        "vocab": {**vocab, **{token["content"]: token["id"] for token in added}},
        "scores": scores,
        # tokenizers < 0.20 wrote "a b", later versions ["a", "b"].
        "merges": [
            merge.split(" ", 1) if isinstance(merge, str) else list(merge)
            for merge in model.get("merges") or []
        ],
        "special": sorted(token["content"] for token in added if token["special"]),
    }
