"""A benchmark's outcome: the rows with their scores as Parquet, a table for people, plain data for JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benchmarks.outcome import AnsweredRow, Outcome, Section, Subset
from jobs.corpus.files import Corpus
from jobs.errors import OutputError

COLUMNS = ["row", "answer", "num_correct", "subset", "id", "problem", "score", "error"]
ROWS_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "id": pa.string(),
        "subset": pa.string(),
        "num_correct": pa.int32(),
        "scores": pa.list_(pa.float32()),
        "gap": pa.float32(),
        "accuracy": pa.float64(),
        "error": pa.string(),
    }
)


def read_rows(scored: Corpus, *, num_rows: int, num_answers: int) -> list[AnsweredRow]:
    """The rows of the dataset, in input order, from the output of the scoring stage.

    Raises:
        OutputError: the output has not each of `num_answers` answers of `num_rows` rows once, or cannot be read.
    """
    try:
        tables = [_read(scored, file.path) for file in scored.files]
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"the scores cannot be read: {error}") from error
    answers = pa.concat_tables(tables).sort_by([("row", "ascending"), ("answer", "ascending")]).to_pylist()
    rows = [_row(row, list(group)) for row, group in groupby(answers, key=lambda answer: int(answer["row"]))]
    if len(answers) != num_answers or [row.row for row in rows] != list(range(num_rows)):
        raise OutputError(
            f"there are scores of {len(answers)} answers in {len(rows)} rows, but the dataset has {num_answers} in "
            f"{num_rows}; choose another --output"
        )
    return rows


def _read(scored: Corpus, path: str) -> pa.Table:
    with scored.filesystem.open_input_file(path) as source:
        return pq.read_table(source, columns=COLUMNS)


def _row(row: int, answers: list[dict[str, Any]]) -> AnsweredRow:
    if [answer["answer"] for answer in answers] != list(range(len(answers))):
        raise OutputError(f"the scores have an answer of row {row} more than once, or not at all")
    first = answers[0]
    errors = [reason for answer in answers if (reason := answer["problem"] or answer["error"])]
    return AnsweredRow(
        row=row,
        id=first["id"],
        subset=first["subset"],
        num_correct=first["num_correct"],
        scores=tuple(answer["score"] for answer in answers) if first["num_correct"] else (),
        error="; ".join(errors) or None,
    )


def table_of(rows: Iterable[AnsweredRow], accuracy: Callable[[AnsweredRow], float]) -> pa.Table:
    """One line a row, in input order: its scores in the order chosen, rejected, and what they come to.

    `gap` is the worst right score minus the best wrong one, `accuracy` what the row counts; `error` says why a score
    is missing.
    """
    return pa.Table.from_pylist(list(_lines(rows, accuracy)), ROWS_SCHEMA)


def _lines(rows: Iterable[AnsweredRow], accuracy: Callable[[AnsweredRow], float]) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {
            "row": row.row,
            "id": row.id,
            "subset": row.subset,
            "num_correct": row.num_correct,
            "scores": row.scores,
            "gap": row.gap,
            "accuracy": accuracy(row),
            "error": row.error,
        }


MAX_NAMED = 20
PARTIAL = "*"


def table(outcome: Outcome, *, model: str, rows: Sequence[AnsweredRow]) -> str:
    """The subsets that there are, the sections beside what is published, and what is missing. Figures in percent."""
    return "\n".join([*_subset_lines(outcome), "", *_section_lines(outcome, model), *_remarks(outcome, rows)])


def as_data(outcome: Outcome, *, rows: Iterable[AnsweredRow]) -> dict[str, Any]:
    """The outcome as JSON has it. Figures are fractions, from 0 to 1, null where there are none."""
    return {
        "benchmark": outcome.benchmark,
        "score": outcome.score,
        "sections": {section.name: section.score for section in outcome.sections},
        "complete": all(section.is_whole for section in outcome.sections),
        "subsets": {subset.name: _subset_data(subset) for subset in outcome.subsets},
        "missing": {section.name: section.missing for section in outcome.sections if section.missing},
        "unscored": [{"row": row.row, "subset": row.subset, "error": row.error} for row in rows if row.error],
        "comparisons": {
            figures.name: {"score": figures.score, "sections": dict(figures.sections)}
            for figures in outcome.comparisons
        },
        "notes": list(outcome.notes),
    }


def _subset_data(subset: Subset) -> dict[str, Any]:
    return {
        "score": subset.score,
        "rows": subset.num_rows,
        "benchmark_rows": subset.benchmark_rows,
        "unscored_rows": subset.num_unscored,
    }


def _subset_lines(outcome: Outcome) -> Iterator[str]:
    width = max(len(subset.name) for subset in outcome.subsets) + 4
    yield f"{'subset':<{width}}{outcome.row_name:>16}{'score':>8}"
    for section in outcome.sections:
        if any(subset.num_rows for subset in section.subsets):
            names = [subset.name for subset in section.subsets]
            if names != [section.name]:
                yield section.name
            yield from (_subset_line(subset, width) for subset in section.subsets)
    if outcome.others:
        yield f"not of {outcome.benchmark}"
        yield from (_subset_line(subset, width) for subset in outcome.others)


def _subset_line(subset: Subset, width: int) -> str:
    total = "" if subset.benchmark_rows is None else f" of {subset.benchmark_rows:>4,}"
    return f"  {subset.name:<{width - 2}}{f'{subset.num_rows:,}{total}':>16}{_percent(subset.score):>8}"


def _section_lines(outcome: Outcome, model: str) -> Iterator[str]:
    names = [section.name for section in outcome.sections]
    width = max(len(label) for label in [model, *(figures.name for figures in outcome.comparisons)])

    def line(label: str, cells: Sequence[str]) -> str:
        widths = (max(len(name), 6) + 3 for name in ["Score", *names])
        return f"{label:<{width}}" + "".join(f"{cell:>{wide}}" for cell, wide in zip(cells, widths, strict=True))

    yield line("", ["Score", *names])
    is_whole = all(section.is_whole for section in outcome.sections)
    ours = [_marked(section.score, section.is_whole) for section in outcome.sections]
    yield line(model, [_marked(outcome.score, is_whole), *ours])
    for figures in outcome.comparisons:
        yield line(figures.name, [_percent(figures.score), *(_percent(figures.sections[name]) for name in names)])


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def _marked(fraction: float | None, is_whole: bool) -> str:
    return ("" if is_whole or fraction is None else PARTIAL) + _percent(fraction)


def _remarks(outcome: Outcome, rows: Iterable[AnsweredRow]) -> Iterator[str]:
    """Remarks on what the figures do not rest on, line by line."""
    absent = [section for section in outcome.sections if not any(subset.num_rows for subset in section.subsets)]
    partial = [section for section in outcome.sections if section not in absent and not section.is_whole]
    if partial:
        yield f"{PARTIAL} not on the benchmark's own rows:"
        yield from (f"  {section.name}: {'; '.join(_differences(section))}" for section in partial)
    if absent:
        yield "missing altogether:"
        yield from (f"  {section.name}{_parts(section)}" for section in absent)
    if outcome.score is None:
        yield "there is no final score while subsets are missing"
    if unscored := [str(row.row) for row in rows if row.error]:
        more = f" and {len(unscored) - MAX_NAMED:,} more" if len(unscored) > MAX_NAMED else ""
        yield (
            f"{outcome.row_name} counted as wrong since an answer has no score: {len(unscored):,}, at rows "
            f"{', '.join(unscored[:MAX_NAMED])}{more} (from 0; rows.parquet says why)"
        )
    yield from outcome.notes


def _parts(section: Section) -> str:
    names = [subset.name for subset in section.subsets]
    return "" if names == [section.name] else f": {', '.join(names)}"


def _differences(section: Section) -> Iterator[str]:
    if missing := [subset.name for subset in section.subsets if not subset.num_rows]:
        yield f"without {', '.join(missing)}"
    for subset in section.subsets:
        if subset.num_rows and subset.num_rows != subset.benchmark_rows:
            yield f"{subset.name} {subset.num_rows:,} of {subset.benchmark_rows:,}"
