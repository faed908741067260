"""Samples to token ids, as a kind of stage reads them; what is cut or dropped is counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from rlhf.data.cutting import LEFT, TURNS, last_exchange, shortened
from rlhf.data.dialogue import parse_dialogue, write_dialogue
from rlhf.data.report import DataReport
from rlhf.data.sample import Sample, SampleMaker
from rlhf.data.sources.base import BadRow
from rlhf.data.templates import Messages
from rlhf.data.tokenizers import Encoder
from rlhf.data.typed import unguarded
from rlhf.stages import Rows
from rlhf.text import normalised

_IDS = pa.list_(pa.int32())
SCHEMAS: dict[Rows, pa.Schema] = {
    "answers": pa.schema({"prompt_ids": _IDS, "answer_ids": _IDS, "unlearned": _IDS}),
    "pairs": pa.schema(
        {
            "prompt_ids": _IDS,
            "chosen_ids": _IDS,
            "rejected_ids": _IDS,
            "margin": pa.float32(),
            "prompt_key": pa.int64(),
        }
    ),
    "prompts": pa.schema({"prompt_ids": _IDS, "prompt": pa.string()}),
}
KEPT = "columns"  # of prompts, with data.keep_columns: their values by name, as JSON
_CHUNK = 1000
Columns = dict[str, list[Any]]


def schema_of(rows: Rows, keep_columns: Sequence[str]) -> pa.Schema:
    """The columns of tokenised rows."""
    kept = [pa.field(KEPT, pa.string())] if rows == "prompts" and keep_columns else []
    return pa.schema([*SCHEMAS[rows], *kept])


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens: of a prompt, of prompt and answer; what to do with longer prompts; which
    assistant turns are learned where answers are imitated."""

    prompt: int
    total: int | None
    long_prompts: str
    multi_turn: str = "last"


def needed_answers(rows: Rows, response_column: str, sample: Sample) -> tuple[str, ...]:
    """The sample's answers that are used where these rows are read."""
    if rows == "pairs":
        return ("chosen", "rejected")
    if rows == "prompts":
        return ()
    if response_column != "auto":
        return (response_column,)
    return ("chosen",) if sample.response is None else ("response",)


def encode(
    samples: Sequence[tuple[Sample, tuple[str, ...]]],
    rows: Rows,
    encoder: Encoder,
    limits: Limits,
    report: DataReport,
    maker: SampleMaker,
    schema: pa.Schema,
) -> tuple[Columns, list[Sample]]:
    """Columns of `schema` (`schema_of`) for samples with the names of the answers they are used
    for, and the samples that they came from, cut as the columns are.

    `report.kept`, `.answers`, `.dropped`, `.bad` and `.truncated` are counted up. `maker` writes a
    conversation again that loses turns.
    """
    columns: Columns = {name: [] for name in schema.names}
    kept: list[Sample] = []
    for start in range(0, len(samples), _CHUNK):
        chunk = samples[start : start + _CHUNK]
        texts = [sample.prompt for sample, _ in chunk]
        prompts = encoder.prompts(texts, [sample.source is None for sample, _ in chunk])
        fitting: list[tuple[Sample, tuple[str, ...], list[int]]] = []
        for (sample, names), prompt in zip(chunk, prompts, strict=True):
            try:
                found = fit_prompt(sample, prompt, encoder, limits, report, maker)
            except BadRow as reason:
                report.add_bad(str(reason), sample.where)
                continue
            if found is not None:
                fitting.append((found[0], names, found[1]))
        flat = encoder.answers([getattr(one, name) for one, names, _ in fitting for name in names])
        answers = iter(flat)
        for sample, names, prompt in fitting:
            ids = [next(answers) for _ in names]
            spans: list[int] = []
            if rows == "answers" and limits.multi_turn == "all" and sample.source is not None:
                try:
                    prompt, ids[0], spans = _all_turns(sample, names[0], encoder, limits, maker)
                except BadRow as reason:
                    report.add_bad(str(reason), sample.where)
                    continue
            cut = _fit(prompt, ids, limits, report, sample.where)
            if cut is not None:
                _append(columns, rows, sample, prompt, cut, spans)
                report.kept += 1
                kept.append(sample)
    return columns, kept


def _all_turns(
    sample: Sample, name: str, encoder: Encoder, limits: Limits, maker: SampleMaker
) -> tuple[list[int], list[int], list[int]]:
    """(prompt ids, ids from the first assistant turn to the last one's eos, spans).

    Spans are starts and ends, in turn, of what is not learned among the second: what the template
    and the user say between the assistant's turns. Whole exchanges go, the oldest first, until the
    conversation fits `limits.total`.
    """

    def parts(one: Sample) -> tuple[list[int], list[int], list[int]]:
        turns = maker.assistant_turns(one, name, encoder.eos)
        prompts = encoder.prompts([turns[0][0]]) + encoder.ids([text for text, _ in turns[1:]])
        answers = encoder.answers([answer for _, answer in turns])
        ids, spans = list(answers[0]), []
        for between, answer in zip(prompts[1:], answers[1:], strict=True):
            spans += [len(ids), len(ids) + len(between)]
            ids += [*between, *answer]
        return prompts[0], ids, spans

    found = parts(sample)
    assert sample.source is not None
    messages = sample.source.prompt
    assert isinstance(messages, list)
    room = limits.total
    if room is None or len(found[0]) + len(found[1]) <= room:
        return found

    def fits(turns: Messages) -> bool:
        prompt, ids, _ = parts(maker.with_prompt(sample, turns))
        return len(prompt) + len(ids) <= room

    shorter = shortened(messages, fits, str)
    if shorter is None or shorter[1] != TURNS:
        latest = last_exchange(messages)
        return parts(maker.with_prompt(sample, latest))
    return parts(maker.with_prompt(sample, shorter[0]))


def fit_prompt(
    sample: Sample,
    prompt: list[int],
    encoder: Encoder,
    limits: Limits,
    report: DataReport,
    maker: SampleMaker,
) -> tuple[Sample, list[int]] | None:
    """A sample whose prompt fits the limit, with the prompt's ids; None: it is dropped, counted.

    The sample's prompt is what the ids say: what is judged is what the model saw. Raises BadRow
    where the template refuses the turns that are left.
    """
    if len(prompt) <= limits.prompt:
        return sample, prompt
    if limits.long_prompts == "drop":
        report.add_dropped("prompt over the limit", sample.where)
        return None
    source = sample.source
    turns = parse_dialogue(sample.prompt) if source is None else source.prompt
    if not isinstance(turns, list):
        head = prompt[:1] if encoder.plain_bos else []
        prompt = head + prompt[len(prompt) - limits.prompt + len(head) :]
        report.add_truncated(LEFT, 1, sample.where)
        return replace(sample, prompt=encoder.text(prompt[len(head) :])), prompt

    def written(messages: Messages) -> Sample:
        if source is None:
            return replace(sample, prompt=write_dialogue(messages))
        return maker.with_prompt(sample, messages)

    def ids_of(one: Sample) -> list[int]:
        return encoder.prompts([one.prompt], [one.source is None])[0]

    def fits(messages: Messages) -> bool:
        return len(ids_of(written(messages))) <= limits.prompt

    found = shortened(turns, fits, encoder.special.mark)
    if found is None:
        report.add_dropped("prompt over the limit even without its earlier turns", sample.where)
        return None
    report.add_truncated(found[1], 1, sample.where)
    cut = written(found[0])
    return cut, ids_of(cut)


def _fit(
    prompt: list[int], answers: list[list[int]], limits: Limits, report: DataReport, where: str
) -> list[list[int]] | None:
    """Answers cut to the room after the prompt; None: they are a pair no more."""
    room = None if limits.total is None else limits.total - len(prompt)
    fitting = [ids[:room] for ids in answers]
    if len(fitting) == 2 and fitting[0] == fitting[1]:
        alike = answers[0] == answers[1]
        reason = "chosen and rejected have the same tokens" if alike else "pair equal once cut"
        report.add_dropped(reason, where)
        return None
    report.answers += len(answers)
    cut = sum(len(a) < len(b) for a, b in zip(fitting, answers, strict=True))
    report.add_truncated("answer", cut, where)
    return fitting


def _append(
    columns: Columns,
    rows: Rows,
    sample: Sample,
    prompt: list[int],
    answers: list[list[int]],
    spans: list[int],
) -> None:
    columns["prompt_ids"].append(prompt)
    if rows == "answers":
        columns["answer_ids"].append(answers[0])
        columns["unlearned"].append(spans)
    elif rows == "pairs":
        columns["chosen_ids"].append(answers[0])
        columns["rejected_ids"].append(answers[1])
        columns["margin"].append(sample.margin or 0.0)
        columns["prompt_key"].append(prompt_key(unguarded(sample.prompt)))
    else:
        columns["prompt"].append(unguarded(sample.prompt))
        if KEPT in columns:
            columns[KEPT].append(json.dumps(sample.columns, ensure_ascii=False))


def prompt_key(prompt: str) -> int:
    """The 64-bit hash of a normalised prompt, the same in every process."""
    digest = hashlib.sha256(normalised(prompt).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
