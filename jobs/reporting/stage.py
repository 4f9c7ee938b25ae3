"""A scored corpus summed up on Ray tasks: summaries come back, rows do not.

    extents -> scales -> counts, and the labelled rows by share of the prompts -> pairs -> the best and worst rows

A task reads a stretch of the corpus; what it returns is as large for a thousand rows as for a hundred million, but for
keys, scores and token counts of labelled rows, which are regrouped so that the candidates of a prompt meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any

import pyarrow as pa
from pyarrow import fs

from jobs.corpus.files import Unit
from jobs.corpus.reader import UnitReader
from jobs.corpus.turns import cells
from jobs.grouping.ranks import Stretch
from jobs.reporting.columns import ReportColumns
from jobs.reporting.counts import Counts, counts_of
from jobs.reporting.extremes import RowPlace, ShownRow, shown_row, text_columns
from jobs.reporting.pairs import LabelledRows, PairsByColumn, joined, pairs_of_prompts, pairs_of_rows, split
from jobs.reporting.scales import Extents, Scales, settled
from jobs.runs.exchange import Pieces, gathered, results, scatter
from serve_app.reward_model.errors import ConversationError

MAX_SHARES = 200
# Ray keeps results below 100 kB in the memory of the driver. What a stretch, 1/200 of a corpus, makes for a share of so
# many rows is larger, at some 27 bytes a row.
ROWS_PER_SHARE = 1 << 20

Examples = Mapping[str, list[ShownRow]]


@dataclass(frozen=True, slots=True)
class Findings:
    """All that a report tells of a corpus. `left_out` tells why columns that were guessed are not in it."""

    columns: ReportColumns
    scales: Scales
    counts: Counts
    pairs: PairsByColumn | None
    best: Examples
    worst: Examples
    left_out: Sequence[str]


@dataclass(frozen=True, slots=True)
class ReportStage:
    """Sums a corpus up on the connected Ray; of each column of scores it shows the `num_examples` best and worst."""

    filesystem: fs.FileSystem
    columns: ReportColumns
    num_examples: int

    def run(self, work: Sequence[Stretch], *, num_rows: int) -> Findings:
        """Findings in the stretches, whose rows are `num_rows`.

        Raises:
            RaywardError: rows cannot be read, or a column that was named proves unfit.
        """
        found = scatter(partial(_extents, stage=self), work, num_parts=2)
        _wait(found, told="stretches read for their extents")
        scales_of = scatter(_scales, [0], num_parts=1, pieces=[gathered(found, 1)[0]])
        (scales,) = results(scales_of)
        columns, left_out = settled(self.columns, scales)
        stage = replace(self, columns=columns)
        counts, pairs = stage._counts(work, scales_of, num_rows)
        best, worst = stage._examples(work, counts, scales)
        return Findings(columns, scales, counts, pairs, best, worst, left_out)

    def _counts(self, work: Sequence[Stretch], scales_of: Pieces, num_rows: int) -> tuple[Counts, PairsByColumn | None]:
        scales = scales_of[0]
        num_shares = min(MAX_SHARES, math.ceil(num_rows / ROWS_PER_SHARE)) if self.columns.label else 0
        counted = scatter(
            partial(_count, stage=self, num_shares=num_shares),
            list(enumerate(work)),
            num_parts=num_shares + 2,
            pieces=[scales for _ in work],
        )
        _wait(counted, told="stretches counted")
        by_piece = gathered(counted, num_shares + 2)
        ((counts, pairs),) = results(scatter(_sum_counts, [0], num_parts=1, pieces=[by_piece[0]]))
        if num_shares:
            shares = scatter(
                partial(_pairs, columns=self.columns),
                range(num_shares),
                num_parts=1,
                pieces=[[*scales, *own] for own in by_piece[2:]],
            )
            (pairs,) = results(scatter(_sum_pairs, [0], num_parts=1, pieces=[gathered(shares, 1)[0]]))
        return counts, pairs

    def _examples(self, work: Sequence[Stretch], counts: Counts, scales: Scales) -> tuple[Examples, Examples]:
        """The best and the worst rows; none where all scores are one, and none that is both."""
        best: dict[str, tuple[RowPlace, ...]] = {}
        worst: dict[str, tuple[RowPlace, ...]] = {}
        for name, found in counts.items():
            num_scored = int(found.scores.moments.count[0])
            quantiles = scales.scores[name].quantiles
            varies = num_scored > 1 and quantiles["0"] < quantiles["1"]
            kept = min(self.num_examples, num_scored // 2) if varies else 0
            best[name], worst[name] = found.extremes.best[:kept], found.extremes.worst[:kept]
        shown = self._shown(work, [(name, place) for side in (best, worst) for name in side for place in side[name]])
        return tuple(  # type: ignore[return-value]
            {name: [shown[name, place] for place in places] for name, places in side.items()} for side in (best, worst)
        )

    def _shown(self, work: Sequence[Stretch], wanted: Sequence[_Wanted]) -> dict[_Wanted, ShownRow]:
        by_stretch: dict[int, list[_Wanted]] = {}
        for one in wanted:
            by_stretch.setdefault(one[1].stretch, []).append(one)
        requests = [(work[stretch], own) for stretch, own in by_stretch.items()]
        found: dict[_Wanted, ShownRow] = {}
        for rows in results(scatter(partial(_read_rows, stage=self), requests, num_parts=1)):
            found |= rows
        return found


_Wanted = tuple[str, RowPlace]


def _wait(pieces: Pieces, *, told: str) -> None:
    """Until all tasks are done; their second piece is nothing, and says so."""
    for _ in results(pieces, part=1, told=told):
        pass


def _tables(stretch: Stretch, stage: ReportStage, columns: Iterable[str]) -> Iterator[pa.Table]:
    for _, table in UnitReader(stage.filesystem, columns=sorted(set(columns))).read(stretch.units):
        if isinstance(table, Exception):
            raise table
        yield table


def _extents(stretch: Stretch, _: object, *, stage: ReportStage) -> list[Extents | None]:
    return [Extents.of(_tables(stretch, stage, stage.columns.narrow()), stage.columns), None]


def _scales(_: int, pieces: Sequence[Extents]) -> list[Scales]:
    return [Scales.of(pieces)]


def _count(
    argument: tuple[int, Stretch], pieces: Sequence[Scales], *, stage: ReportStage, num_shares: int
) -> list[Any]:
    """The counts of a stretch, nothing, and its labelled rows by share of the prompts."""
    (number, stretch), (scales,) = argument, pieces
    columns = stage.columns
    labelled: list[LabelledRows] = []
    pairs: list[PairsByColumn] = []

    def tables() -> Iterator[pa.Table]:
        names = [*columns.narrow(), *(columns.label.keys.columns if columns.label else ())]
        for table in _tables(stretch, stage, names):
            if columns.label is not None:
                labelled.append(LabelledRows.of(table, columns, scales))
            if columns.pair is not None:
                pairs.append(pairs_of_rows(table, columns, scales))
            yield table

    counts = counts_of(tables(), columns, scales, stretch=number, num_examples=stage.num_examples)
    total = reduce(add, pairs) if pairs else None
    return [(counts, total), None, *(split(joined(labelled), num_shares) if num_shares else ())]


def _pairs(_: int, pieces: Sequence[Any], *, columns: ReportColumns) -> list[PairsByColumn]:
    """The pairs of one share of the prompts."""
    scales: Scales = pieces[0]
    return [pairs_of_prompts(joined(pieces[1:]), columns, scales)]


def _sum_counts(
    _: int, pieces: Sequence[tuple[Counts, PairsByColumn | None]]
) -> list[tuple[Counts, PairsByColumn | None]]:
    names = pieces[0][0]
    counts = {name: reduce(add, [own[name] for own, _ in pieces]) for name in names}
    pairs = [own for _, own in pieces if own is not None]
    return [(counts, reduce(add, pairs) if pairs else None)]


def _sum_pairs(_: int, pieces: Sequence[PairsByColumn]) -> list[PairsByColumn]:
    return [reduce(add, pieces)]


def _read_rows(
    request: tuple[Stretch, list[_Wanted]], _: object, *, stage: ReportStage
) -> list[dict[_Wanted, ShownRow]]:
    """The rows of a stretch that are shown."""
    stretch, wanted = request
    columns = {column.name: column for column in stage.columns.scores}
    names = {name for column in columns.values() for name in text_columns(column, stage.columns)}
    starts = dict(stretch.placed())
    needed = [unit for unit, start in starts.items() if any(_is_in(unit, start, place) for _, place in wanted)]
    found: dict[_Wanted, ShownRow] = {}
    for unit, table in UnitReader(stage.filesystem, columns=sorted(names)).read(needed):
        if isinstance(table, Exception):
            raise table
        for name, place in wanted:
            if _is_in(unit, starts[unit], place):
                row = place.row - starts[unit]
                values = {column: _readable(table.column(column).slice(row, 1)) for column in table.column_names}
                file, number = unit.place(row)
                found[name, place] = shown_row(values, columns[name], stage.columns, file=file, row=number)
    return [found]


def _readable(column: pa.ChunkedArray) -> Any:
    """The one value of a column, or why it cannot be read."""
    (value,) = cells(column)
    return f"({value})" if isinstance(value, ConversationError) else value


def _is_in(unit: Unit, start: int, place: RowPlace) -> bool:
    return start <= place.row < start + unit.num_rows
