"""Samples to token ids, one function per step; what is cut or dropped is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rlhf.data.report import DataReport
from rlhf.data.sample import Sample
from rlhf.data.tokenizers import Encoder

_IDS = pa.list_(pa.int32())
SCHEMAS: dict[int, pa.Schema] = {
    1: pa.schema({"prompt_ids": _IDS, "answer_ids": _IDS}),
    2: pa.schema(
        {
            "prompt_ids": _IDS,
            "chosen_ids": _IDS,
            "rejected_ids": _IDS,
            "margin": pa.float32(),
            "prompt_key": pa.int64(),
        }
    ),
    3: pa.schema({"prompt_ids": _IDS, "prompt": pa.string()}),
}
_CHUNK = 1000
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens: of a prompt, of prompt and answer; what to do with longer prompts."""

    prompt: int
    total: int | None
    long_prompts: str


def needed_answers(step: int, response_column: str, sample: Sample) -> tuple[str, ...]:
    """The sample's answers that a step uses."""
    if step == 2:
        return ("chosen", "rejected")
    if step == 3:
        return ()
    if response_column != "auto":
        return (response_column,)
    return ("chosen",) if sample.response is None else ("response",)


def encode(
    samples: Sequence[tuple[Sample, tuple[str, ...]]],
    step: int,
    encoder: Encoder,
    limits: Limits,
    report: DataReport,
) -> tuple[Columns, list[Sample]]:
    """Columns of SCHEMAS[step] for samples with the names of the answers they are used for, and
    the samples that they came from.

    `report.kept`, `.dropped` and `.truncated` are counted up.
    """
    columns: Columns = {name: [] for name in SCHEMAS[step].names}
    kept: list[Sample] = []
    for start in range(0, len(samples), _CHUNK):
        chunk = samples[start : start + _CHUNK]
        prompts = encoder.prompts([sample.prompt for sample, _ in chunk])
        flat = encoder.answers([getattr(one, name) for one, names in chunk for name in names])
        answers = iter(flat)
        for (sample, names), prompt in zip(chunk, prompts, strict=True):
            ids = [next(answers) for _ in names]
            row = _fit(prompt, ids, encoder, limits, report, sample.where)
            if row is not None:
                _append(columns, step, sample, *row)
                report.kept += 1
                kept.append(sample)
    return columns, kept


def _fit(
    prompt: list[int],
    answers: list[list[int]],
    encoder: Encoder,
    limits: Limits,
    report: DataReport,
    where: str,
) -> tuple[list[int], list[list[int]]] | None:
    long_prompt = len(prompt) > limits.prompt
    if long_prompt and limits.long_prompts == "drop":
        report.add_dropped("prompt over the limit", where)
        return None
    if long_prompt:
        head = prompt[:1] if encoder.bos else []
        prompt = head + prompt[len(prompt) - limits.prompt + len(head) :]
    room = None if limits.total is None else limits.total - len(prompt)
    fitting = [ids[:room] for ids in answers]
    if len(fitting) == 2 and fitting[0] == fitting[1]:
        alike = answers[0] == answers[1]
        reason = "chosen and rejected have the same tokens" if alike else "pair equal once cut"
        report.add_dropped(reason, where)
        return None
    cut = sum(len(a) < len(b) for a, b in zip(fitting, answers, strict=True))
    report.add_truncated("prompt", int(long_prompt), where)
    report.add_truncated("answer", cut, where)
    return prompt, fitting


def _append(
    columns: Columns, step: int, sample: Sample, prompt: list[int], answers: list[list[int]]
) -> None:
    columns["prompt_ids"].append(prompt)
    if step == 1:
        columns["answer_ids"].append(answers[0])
    elif step == 2:
        columns["chosen_ids"].append(answers[0])
        columns["rejected_ids"].append(answers[1])
        columns["margin"].append(sample.margin or 0.0)
        columns["prompt_key"].append(prompt_key(sample.prompt))
    else:
        columns["prompt"].append(sample.prompt)


def prompt_key(prompt: str) -> int:
    """A prompt's 64-bit hash, the same in every process."""
    digest = hashlib.sha256(prompt.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
