"""A judge that says aloud what it must not: what a careless library or a user's own code may do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence


def score(prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
    token = os.environ["HF_TOKEN"]
    paths = json.loads(os.environ["RLHF_HIDDEN_SETTINGS"])["config.data.path"]
    print("printed:", token, paths, flush=True)
    print("told as an error:", token, file=sys.stderr, flush=True)
    os.write(2, f"past Python's streams: Bearer {token}\n".encode())
    for piece in ("in two ", "pieces: ", token[:5], token[5:], "\n"):
        os.write(1, piece.encode())
    return [float(len(answer)) for answer in answers]
