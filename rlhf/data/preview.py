"""The first rows of every data set, before any model is loaded: `python -m rlhf.data.preview FILE`.

FILE is a step's resolved.json; several files give several stages. Prints one JSON object and ends
with its `exit_code`: 0, 2 (a setting is wrong) or 3 (data is absent or cannot be used).

    stages    [{"step": 1, "lines": [text, ...]}]: what a person should see of that step's rows
    problems  [{"what": ..., "found": ..., "remedy": ..., "exit_code": 2 or 3}]
    sources   [{"name": ..., "fingerprint": ..., "rows": N or null}]: the content, by data set
    notes     [text]: what was not looked at, and why
    files     [text]: each file with its rows and whether they are held out

It imports no torch. Hub data that is not in the local cache is not fetched unless `--download` is
given, which is what a run does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

from rlhf.config.hub_cache import is_cached
from rlhf.config.keys import nearest
from rlhf.config.names import hub_dataset
from rlhf.config.schema import DataConfig, ResolvedStep
from rlhf.data.decision import UNKNOWN, Template, stage_templates
from rlhf.data.encode import needed_answers
from rlhf.data.prepare import survey
from rlhf.data.sample import ANSWERS, Sample, SampleMaker
from rlhf.data.shapes import Reader, shapes_of
from rlhf.data.sources import SOURCES, BadRow, DataSet, Part, Row, gathered, kind_of
from rlhf.data.sources.base import NoPreference
from rlhf.data.templates import TEMPLATES, Messages, sandbox_render
from rlhf.data.typed import unguarded
from rlhf.errors import UserError
from rlhf.redact import redact

FIRST_ROWS = 20
SHOWN_ROWS = 2
SHOWN_CHARACTERS = 200
NONE_USABLE = "{} can use none of the first rows"
# Rows are counted where that takes no more than a second or two.
COUNTED_BYTES = 64 * 10**6


@dataclass(frozen=True)
class Problem:
    what: str
    found: str
    remedy: str
    exit_code: int


@dataclass
class Preview:
    stages: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return min((problem.exit_code for problem in self.problems), default=0)


def look(stages: Sequence[ResolvedStep], download: bool = False) -> Preview:
    """Opens the data of a run and makes samples of its first rows, for each stage's needs.

    `stages` belong to one run: they share `config.data`.
    """
    found = Preview()
    data = stages[0].config.data
    sets = _opened(data, download, found)
    templates: Sequence[Template | None] = [None] * len(stages)
    refused: UserError | None = None
    try:
        templates = stage_templates(stages, sets) if sets else templates
    except UserError as error:
        refused = error
    rows = [_stage(*both, found) for both in zip(stages, repeat(sets), templates, strict=False)]
    counted = _surveyed(stages, sets, templates, found)
    for stage, template, lines in zip(stages, templates, rows, strict=True):
        said = [f"chat template: {template.sentence}"] if template else []
        said += counted.get(stage.row.name, [])
        found.stages.append({"step": stage.step, "lines": [*said, *lines]})
    if refused is not None:  # last: of a fault of the rows the stage knows the remedy
        _add(found, Problem("data.template", str(refused), "", refused.exit_code))
    return found


def _opened(data: DataConfig, download: bool, found: Preview) -> list[DataSet]:
    """The data sets that can be opened; those that cannot become problems, each by its path."""
    sets: list[DataSet] = []
    counts: dict[str, int | None] = {}
    for path in data.path:
        hub = hub_dataset(path) if kind_of(path) == "hub" else None
        if hub and not download and not is_cached("datasets", hub):
            note = f"{path}: not downloaded yet; a run fetches it and looks before anything else"
            found.notes.append(note)
            continue
        try:
            one = SOURCES[kind_of(path)](path, data)
        except UserError as error:
            if hub and error.__cause__ is not None and not download:
                found.notes.append(
                    f"{path}: cannot be opened from the cache alone; a run fetches it"
                )
            else:
                _add(found, Problem("data.path", str(error), "", error.exit_code))
            continue
        sets.append(one)
        rows = [_rows_of(part) for part in one.parts]
        counts |= {part.name: count for part, count in zip(one.parts, rows, strict=True)}
        count = None if None in rows else sum(row for row in rows if row is not None)
        found.sources.append({"name": redact(path), "fingerprint": one.fingerprint, "rows": count})
    if len(sets) == len(data.path):  # else it is not known whether there is anything to train on
        sets = gathered(sets, data)
    found.notes += [note for one in sets for note in one.notes]
    for part in (part for one in sets for part in one.parts):
        count = counts[part.name]
        told = "rows not counted" if count is None else f"{count:,} rows"
        found.files.append(f"{part.name}: {told}, {'held out' if part.held_out else 'training'}")
    return sets


def _surveyed(
    stages: Sequence[ResolvedStep],
    sets: Sequence[DataSet],
    templates: Sequence[Template | None],
    found: Preview,
) -> dict[str, list[str]]:
    """Stage -> how its rows are read and split; a problem where a step would have none.

    Large data is left to the steps themselves.
    """
    large = [part.name for one in sets for part in one.parts if _is_large(part)]
    if large or not sets or len(found.sources) < len(stages[0].config.data.path):
        found.notes += [f"{name}: over {COUNTED_BYTES // 10**6} MB, not counted" for name in large]
        return {}
    data = stages[0].config.data
    asked = [
        (
            stage.row,
            stage.config.step1.response_column,
            stage.row.rows == "pairs" and stage.config.step2.margin == "column",
        )
        for stage in stages
    ]
    lines: dict[str, list[str]] = {}
    try:
        maker = _maker(data, templates[0])
        shares = list(survey(data, sets, maker, asked, stages[0].config.seed))
    except UserError:
        return {}  # of the first rows too: told there, with a remedy
    for stage, share in zip(stages, shares, strict=True):
        if isinstance(share, UserError):
            if not any(NONE_USABLE.format(stage.row) in one.found for one in found.problems):
                _add(found, Problem("data", str(share), "", share.exit_code))
            continue
        told = f"{share.training:,} training rows; {share.held_out.line()}"
        if not share.held_out.rows and stage.row.evaluates:
            told += ", and there is no verdict"
        lines[stage.row.name] = [told, *share.report.lines()]
    return lines


def _is_large(part: Part) -> bool:
    place = Path(part.name)
    return place.is_file() and place.stat().st_size > COUNTED_BYTES


def _rows_of(part: Part) -> int | None:
    if _is_large(part):
        return None
    try:
        return sum(1 for _ in part.rows())
    except UserError:
        return None


def _stage(
    stage: ResolvedStep, sets: Sequence[DataSet], template: Template | None, found: Preview
) -> list[str]:
    data = stage.config.data
    lines: list[str] = []
    try:
        maker = _maker(data, template)
        for one in sets:
            for shape, parts in shapes_of(one, data):
                for part in (part for part in parts if not part.held_out):
                    lines += _part(stage, part, Reader(shape, data), maker, found)
    except UserError as error:
        unknown = next((key for key in data.columns if f"{key} unknown" in str(error)), "")
        close = nearest(unknown, ("prompt", *ANSWERS, "messages", "margin")) if unknown else []
        remedy = f"Did you mean data.columns.{close[0]}?" if close else ""
        _add(found, Problem("data", str(error), remedy, error.exit_code))
        return []
    return lines


def _part(
    stage: ResolvedStep, part: Part, reader: Reader, maker: SampleMaker, found: Preview
) -> list[str]:
    """Lines for a person; a problem if none of the part's first rows can be used."""
    lines = [f"{part.name}: the first rows for {stage.row}"]
    reasons: list[tuple[str, str]] = []
    columns: dict[str, None] = {}
    made = 0
    try:
        for where, row in itertools.islice(part.rows(), FIRST_ROWS):
            if not isinstance(row, BadRow):
                columns |= dict.fromkeys(row)
            try:
                sample = _sample(stage, reader, maker, row, where)
            except NoPreference:
                made += 1
            except BadRow as reason:
                reasons.append((where, str(reason)))
            else:
                made += 1
                lines += _shown(sample, stage) if made <= SHOWN_ROWS else []
    except UserError as error:
        _add(found, Problem("data.path", str(error), "", error.exit_code))
        return []
    if not made and not reasons:
        _add(found, Problem("data.path", f"{part.name}: no rows", "give a file with rows", 3))
    elif not made:
        _add(found, _unusable(stage, part, reasons[0], list(columns)))
    return lines if made else []


def _sample(
    stage: ResolvedStep, reader: Reader, maker: SampleMaker, row: Row | BadRow, where: str
) -> Sample:
    """The first of a row's samples; a row of several rated answers gives more than one."""
    if isinstance(row, BadRow):
        raise row
    sample = next(maker(one, where) for one in reader(row))
    sample = replace(sample, columns=reader.kept(row))
    mapping = stage.config.data.columns
    for name in needed_answers(stage.row.rows, stage.config.step1.response_column, sample):
        if getattr(sample, name) is None:
            raise BadRow(sample.lacks or f"column {mapping.get(name, name)!r} is missing")
    return sample


def _unusable(
    stage: ResolvedStep, part: Part, first: tuple[str, str], columns: list[str]
) -> Problem:
    where, reason = first
    mapping = stage.config.data.columns
    absent = [key for key, column in mapping.items() if column not in columns]
    found = f"{NONE_USABLE.format(stage.row)}: {where}: {reason}"
    if not columns:
        return Problem("data.path", found, "mend the file", 3)
    if absent:
        found = f"{part.name} has no column {mapping[absent[0]]!r} (data.columns.{absent[0]})"
        close = nearest(mapping[absent[0]], columns)
        remedy = f"say which column it is: data.columns.{absent[0]}={(close or ['COLUMN'])[0]}"
        return Problem("data.columns", f"{found}; the columns are {', '.join(columns)}", remedy, 2)
    found += f"; the columns are {', '.join(columns)}"
    missing = reason.split("'")[1] if reason.startswith("column '") else ""
    ours = next((key for key, column in mapping.items() if column == missing), missing)
    free = [name for name in columns if name not in mapping.values()]
    close = nearest(missing, free) if missing else []
    if stage.row.rows == "pairs" and ours in ("chosen", "rejected") and not close:
        remedy = (
            f"{stage.row} needs pairs: name the columns of both answers "
            "(data.columns.chosen=COLUMN data.columns.rejected=COLUMN), bring such "
            "rows, or run --step 1 alone"
        )
        return Problem("data.columns", found, remedy, 3)
    if not ours or "is missing" not in reason:
        return Problem("data", found, "mend these rows (docs/data.md says what is read)", 3)
    remedy = f"say which column it is: data.columns.{ours}={close[0] if close else 'COLUMN'}"
    return Problem("data.columns", found, remedy, 3)


def _shown(sample: Sample, stage: ResolvedStep) -> Iterator[str]:
    """What the step reads of a row, what it learns from, and where EOS is put."""
    learned = stage.row.rows == "answers" and stage.config.step1.prompt_loss
    yield f"  prompt   {_short(sample.prompt)}  [{'learned too' if learned else 'read'}]"
    names = needed_answers(stage.row.rows, stage.config.step1.response_column, sample)
    for name in names:
        use = "learned" if stage.row.rows == "answers" else "scored"
        yield f"  {name:8} {_short(getattr(sample, name) or '')} + EOS  [{use}]"
    if stage.row.rows == "prompts":
        yield "  answer   the policy writes it"
        for name, value in sample.columns.items():
            yield f"  {name:8} {_short(str(value))}  [given to rewards and judge]"


def _short(text: str) -> str:
    """Quoted; of a long text the beginning and the end."""
    text = unguarded(text)
    if len(text) <= SHOWN_CHARACTERS:
        return repr(text)
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]!r} ...{len(text) - 2 * half} characters... {text[-half:]!r}"


def _maker(data: DataConfig, template: Template | None) -> SampleMaker:
    """Conversations as the template writes them, without bos and eos; where the model that brings
    it is not here yet, only whether they are whole is asked."""
    if template is None or template.text == UNKNOWN:
        return SampleMaker(data, _plain_text, "tools tool_calls reasoning_content")
    text = TEMPLATES.get(template.text, template.text)

    def written(messages: Messages, generate: bool, tools: Any = None, /) -> str:
        return sandbox_render(text, messages, generate, tools)

    return SampleMaker(data, written, text)


def _plain_text(messages: Messages, generate: bool, tools: Any = None, /) -> str:
    """Conversations without a tokenizer's template: asked is whether they are whole."""
    return "".join(f"\n\n{one['role']}: {one['content']}" for one in messages)


def _add(found: Preview, problem: Problem) -> None:
    """Each once: the stages share their data."""
    if problem.found not in [other.found for other in found.problems]:
        found.problems.append(problem)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf.data.preview", description=__doc__)
    parser.add_argument("resolved", nargs="+", type=Path, help="resolved.json of a step")
    parser.add_argument("--download", action="store_true", help="fetch hub data that is not here")
    flags = parser.parse_args(argv)
    stages = [ResolvedStep.model_validate_json(path.read_bytes()) for path in flags.resolved]
    with open(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)  # what libraries print is not part of the answer
        preview = look(stages, flags.download)
        answer.write(json.dumps({**asdict(preview), "exit_code": preview.exit_code}))
    return preview.exit_code


if __name__ == "__main__":
    sys.exit(main())
