"""`prepare`: from the data settings to one step's tokenised rows, through the cache.

Rows are read and split before it is asked what a step needs of them: the three steps see the same
unique contents and so agree on the split.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rlhf import stall
from rlhf.config.schema import DataConfig
from rlhf.data import cache
from rlhf.data.encode import Limits, encode, needed_answers, schema_of
from rlhf.data.report import DataReport, HeldOut
from rlhf.data.sample import Sample, SampleMaker
from rlhf.data.shapes import Reader, shapes_of
from rlhf.data.sources import BadRow, DataSet, Part, open_data_sets
from rlhf.data.sources.base import NoPreference, Row, sha256
from rlhf.data.split import Assignment, Keys, assign, draw
from rlhf.data.templates import render
from rlhf.data.tokenizers import Encoder, fingerprint
from rlhf.errors import ConfigError, DataError, UserError
from rlhf.stages import Stage, get

if TYPE_CHECKING:
    import datasets

# Raise it when the same settings and data would give other rows.
FORMAT_VERSION = 4
Split = Literal["train", "eval"]
Guard = Callable[[Row], Row]
LEFT_OUT = "held-out row whose prompt is trained on"


@dataclass(frozen=True)
class StageData:
    """One step's rows (columns: `rlhf.data.encode.SCHEMAS`), what became of all rows, the sha256 of
    the tokenised rows, and how much of a test they are."""

    dataset: datasets.Dataset
    report: DataReport
    fingerprint: str
    held_out: HeldOut

    def lines(self, split: Split) -> list[str]:
        """For printing: the report's, and how much of a test the rows of `eval` are."""
        lines = self.report.lines() + [self.held_out.line()] * (split == "eval")
        return [f"{split} data: {line}" for line in lines]


@dataclass(frozen=True)
class _Request:
    data: DataConfig
    stage: Stage
    seed: int
    limits: Limits
    response_column: str
    margins: bool
    split: Split


class _Found(NamedTuple):
    sample: Sample
    held_out: bool  # said by its source


def prepare(
    data: DataConfig,
    step: Stage | str | int,
    tokenizer: Any,
    *,
    seed: int,
    max_prompt_length: int,
    max_length: int | None,
    response_column: str = "auto",
    margins: bool = False,
    split: Split = "train",
) -> StageData:
    """Read, split and tokenise the rows of one step, or take them from the cache.

    The tokenizer must have an eos token; it is not changed. Rows come in an order that depends on
    their content and the seed only. `margins`: step 2 needs each row's. `split="eval"` gives the
    held-out rows, the same for all steps. There are none if that was asked for (data.eval_fraction
    is 0, and no data set brings a test split), or if none has the answers that the step reads.
    Raises DataError (unreadable, not understood, too many bad rows, no row left) and ConfigError
    (formats, columns, template).
    """
    if max_length is not None and max_length <= max_prompt_length:
        raise ConfigError(
            f"max_length {max_length} must be more than max_prompt_length {max_prompt_length}: "
            "answers need room"
        )
    stage = get(step)
    total = None if stage.rows == "prompts" else max_length
    limits = Limits(max_prompt_length, total, data.long_prompts, data.multi_turn)
    request = _Request(data, stage, seed, limits, response_column, margins, split)
    encoder = Encoder(tokenizer, data.template)
    sets = open_data_sets(data)
    root = cache.data_root(data.cache_dir)
    key = _key(request, encoder, tokenizer, sets)
    found = cache.load(root, key)
    if found is None:
        _build(request, encoder, tokenizer, sets, root, key)
        found = cache.load(root, key)
    if found is None:
        raise DataError(f"data cache {root}: {key}.arrow changed while it was written; try again")
    dataset, info = found
    report = DataReport.from_dict(info["report"])
    report.notes = _notes(sets)  # of the files as they lie now; the cache knows their content only
    _check(request, report)
    return StageData(dataset, report, info["fingerprint"], HeldOut(**info["held_out"]))


@dataclass(frozen=True)
class Share:
    """A step's rows before they are tokenised: the report on all rows that were read, how many rows
    the step trains on, and what is held out."""

    report: DataReport
    training: int
    held_out: HeldOut


def survey(
    data: DataConfig,
    sets: Sequence[DataSet],
    maker: SampleMaker,
    stages: Sequence[tuple[Stage, str, bool]],
    seed: int,
) -> Iterator[Share | UserError]:
    """What `prepare` will give each of the stages (stage, response column, needs margins), without
    a tokenizer: rows that only turn out too long once they are tokenised still count.

    Yields the error that `prepare` would raise in the place of a step that has no rows. Raises
    UserError for data that cannot be read.
    """
    whole = DataReport()
    limits = Limits(0, None, data.long_prompts, data.multi_turn)
    rows, keys = _read(data, sets, maker, lambda row: row, whole)
    assigned = assign(keys, data.split, data.eval_fraction, seed)
    for stage, response_column, margins in stages:
        report = copy.deepcopy(whole)
        request = _Request(data, stage, seed, limits, response_column, margins, "train")
        held = replace(request, split="eval")
        try:
            used = _usable(_select(request, rows, assigned, report), request, report)
            report.kept = len(used)
            _check(request, report)
            aside = DataReport()
            selected = _select(held, rows, assigned, aside)
            kept = _usable(selected, held, aside)
            aside.check(data.max_bad_rows)
            if not kept and not selected:
                _check_asked_for(held, keys, assigned, aside)
        except UserError as error:
            yield error
            continue
        prompts = {sample.prompt_key for sample, _ in kept}
        held_out = HeldOut(len(kept), len(prompts), len(prompts & assigned.trained))
        yield Share(report, len(used), held_out)


def brings_held_out(data_set: DataSet) -> bool:
    """Whether a data set has a test split of its own."""
    return any(part.held_out for part in data_set.parts)


def _notes(sets: Sequence[DataSet]) -> list[str]:
    return [note for one in sets for note in one.notes]


# Which files are read, and how much at most: what they hold has a fingerprint.
_NOT_CONTENT = {"hub_split", "hub_eval_split", "limits"}


def _key(request: _Request, encoder: Encoder, tokenizer: Any, sets: Sequence[DataSet]) -> str:
    data = request.data.model_dump(
        exclude={"path", "template", "cache_dir", "max_bad_rows", *_NOT_CONTENT}
    )
    if request.stage.rows != "prompts" or not request.data.keep_columns:
        del data["keep_columns"]
    settings = {
        "format": FORMAT_VERSION,
        "sources": [one.fingerprint for one in sets],
        "tokenizer": fingerprint(tokenizer),
        "template": encoder.template,
        "data": data,
        "rows": [request.stage.rows, *request.stage.shares],
        "seed": request.seed,
        "limits": [request.limits.prompt, request.limits.total],
        "response_column": request.response_column,
        "margins": request.margins,
        "split": request.split,
    }
    return sha256(json.dumps(settings, sort_keys=True))


def _build(
    request: _Request,
    encoder: Encoder,
    tokenizer: Any,
    sets: Sequence[DataSet],
    root: Any,
    key: str,
) -> None:
    report = DataReport(notes=_notes(sets))
    maker = SampleMaker(
        request.data,
        lambda messages, generate, tools=None: render(
            tokenizer, encoder.template, messages, generate=generate, tools=tools
        ).removeprefix(encoder.bos),
        encoder.template,
    )
    data = request.data
    samples, keys = _read(data, sets, maker, encoder.special.guard, report)
    assigned = assign(keys, data.split, data.eval_fraction, request.seed)
    selected = _select(request, samples, assigned, report)
    used = _usable(selected, request, report)
    _check(request, report, only_bad=True)
    rows = request.stage.rows
    schema = schema_of(rows, data.keep_columns)
    columns, kept = encode(used, rows, encoder, request.limits, report, maker, schema)
    _check(request, report)
    # Test rows that are prompts alone serve step 3; the others measure nothing, and say so.
    if request.split == "eval" and not kept and (used or not selected):
        _check_asked_for(request, keys, assigned, report)
    prompts = {sample.prompt_key for sample in kept}
    held_out = HeldOut(len(kept), len(prompts), len(prompts & assigned.trained))
    info = {
        "report": report.to_dict(),
        "fingerprint": sha256(json.dumps(columns)),
        "held_out": vars(held_out),
        "stage": request.stage.name,
    }
    cache.store(root, key, columns, schema, info)


def _read(
    data: DataConfig,
    sets: Sequence[DataSet],
    maker: SampleMaker,
    guard: Guard,
    report: DataReport,
) -> tuple[list[_Found], list[Keys]]:
    """All usable rows, and per data set the keys of its parts' rows."""
    rows: list[_Found] = []
    keys: list[Keys] = []
    seen: set[str] = set()
    for one in sets:
        readers = {}
        for shape, parts in shapes_of(one, data):
            readers.update(dict.fromkeys((part.name for part in parts), Reader(shape, data)))
        by_role: tuple[dict[str, str], dict[str, str]] = ({}, {})
        for part in sorted(one.parts, key=lambda part: part.fingerprint):
            for sample in _samples(part, readers[part.name], maker, guard, report):
                if sample.key in seen:
                    report.add_duplicate(sample.where)
                seen.add(sample.key)
                by_role[part.held_out][sample.key] = sample.prompt_key
                rows.append(_Found(sample, part.held_out))
        for reader in dict.fromkeys(readers.values()):
            report.shapes += [*reader.finish(), *maker.notes(reader.shape)]
        keys.append(Keys(by_role[False], by_role[True], brings_held_out(one)))
    return rows, keys


def _samples(
    part: Part, reader: Reader, maker: SampleMaker, guard: Guard, report: DataReport
) -> Iterator[Sample]:
    for where, row in part.rows():
        report.read += 1
        stall.mark()
        try:
            if isinstance(row, BadRow):
                raise row
            kept = reader.kept(row)
            samples = [replace(maker(one, where), columns=kept) for one in reader(guard(row))]
        except NoPreference as reason:
            report.add_dropped(str(reason), where)
        except BadRow as reason:
            report.add_bad(str(reason), where)
        else:
            report.extra += len(samples) - 1
            yield from samples


def _select(
    request: _Request, rows: Sequence[_Found], assigned: Assignment, report: DataReport
) -> list[Sample]:
    """This step's or the held-out samples, in the order of their keys' seeded hashes."""
    data = request.data
    brought = {row.sample.key for row in rows if row.held_out}
    wanted: Collection[str] = assigned.held_out
    if request.split == "train":
        wanted = {key for key, share in assigned.shares.items() if share in request.stage.shares}
    limit = data.max_eval_rows if request.split == "eval" else data.max_train_rows
    by_key: dict[str, list[Sample]] = {}
    for row in rows:
        if row.sample.key in brought and not row.held_out:
            report.add_dropped("training row that is also held out", row.sample.where)
        elif row.sample.key in assigned.left_out:
            report.add_dropped(LEFT_OUT, row.sample.where)
        elif row.sample.key in wanted:
            by_key.setdefault(row.sample.key, []).append(row.sample)
        else:
            report.elsewhere += 1
    order = [one for key in draw(by_key, request.seed, "order") for one in by_key[key]]
    if limit is not None and len(order) > limit:
        report.dropped[f"over max_{request.split}_rows"] += len(order) - limit
    return order[:limit]


def _usable(
    samples: Sequence[Sample], request: _Request, report: DataReport
) -> list[tuple[Sample, tuple[str, ...]]]:
    """Samples that have the answers the step needs, with these answers' names.

    A held-out row may consist of a prompt alone: that is no fault, it is of use in step 3 only.
    """
    used = []
    for sample in samples:
        names = needed_answers(request.stage.rows, request.response_column, sample)
        texts = [getattr(sample, name) for name in names]
        columns = [request.data.columns.get(name, name) for name in names]
        lacking = [c for c, text in zip(columns, texts, strict=True) if text is None]
        margin = request.data.columns.get("margin", "margin")
        empty = [c for c, t in zip(columns, texts, strict=True) if t is not None and not t.strip()]
        if lacking and request.split == "eval":
            report.add_dropped(f"held-out row without {lacking[0]!r}", sample.where)
        elif lacking:
            report.add_bad(sample.lacks or f"column {lacking[0]!r} is missing", sample.where)
        elif request.stage.rows == "prompts" and (
            nothing := [name for name, value in sample.columns.items() if value is None]
        ):
            why = f"column {nothing[0]!r} of data.keep_columns is missing or null"
            report.add_bad(why, sample.where)
        elif empty:
            report.add_bad(f"column {empty[0]!r} is empty, so the row is left out", sample.where)
        elif request.margins and sample.margin is None:
            report.add_bad(f"column {margin!r} is missing or not a number", sample.where)
        elif len(texts) == 2 and texts[0] == texts[1]:
            report.add_bad("chosen equals rejected", sample.where)
        else:
            used.append((sample, names))
    return used


def _check(request: _Request, report: DataReport, *, only_bad: bool = False) -> None:
    report.check(request.data.max_bad_rows)
    if only_bad or report.kept or request.split == "eval":
        return
    details = "\n  ".join(report.lines())
    raise DataError(
        f"{request.stage} has no training rows left (data.path {request.data.path}, "
        f"data.split {request.data.split}); give more data, a larger share, or mend what this "
        f"says:\n  {details}"
    )


def _check_asked_for(
    request: _Request, keys: Sequence[Keys], assigned: Assignment, report: DataReport
) -> None:
    """Raise DataError if no row is held out and the settings do not ask for that."""
    data, brings = request.data, any(one.brings_held_out for one in keys)
    if data.eval_fraction == 0 and not brings:
        return
    if assigned.held_out:
        why = f"none of the {len(assigned.held_out)} rows that are held out can be used"
    elif brings:
        why = "the test split has no usable row"
    else:
        prompts = len({prompt for one in keys for prompt in one.train.values()})
        why = f"data.eval_fraction {data.eval_fraction:g} of {prompts} different prompts is none"
    more = "test rows" if brings else "rows or a larger data.eval_fraction"
    leave_out = "take the test split out of data.path and " if brings else ""
    details = "\n  ".join(report.lines())
    raise DataError(
        f"{request.stage} has no held-out rows to be measured on: {why}. Bring more {more}, or "
        f"mend what is said below; for a run that measures nothing, {leave_out}set "
        f"data.eval_fraction=0. data.path {data.path}:\n  {details}"
    )
