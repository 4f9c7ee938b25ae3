"""Ranks within groups: pure functions of arrays, and over a whole corpus, where keys and scores are regrouped and rows
are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from jobs.corpus.files import Unit
from jobs.corpus.reader import UnitReader, read_tasks
from jobs.grouping.keys import GroupKeys
from jobs.grouping.quantiles import ScoreSummary
from jobs.runs.exchange import gathered, results, scatter
from jobs.runs.ledger import Ledger, UnitStats


@dataclass(frozen=True, slots=True)
class GroupRanks:
    """For each row: its `rank`, -1 where it has none; its `group_size`, -1 where it has no group; its `margin`."""

    rank: NDArray[np.int32]
    group_size: NDArray[np.int32]
    margin: NDArray[np.float32]


def rank_groups(keys_N2: NDArray[np.uint64], scores_N: NDArray[np.float32]) -> GroupRanks:
    """Rank rows within the groups that their keys make, 0 the best; equal scores rank in the order given.

    Args:
        keys_N2: the group of each row; two zeros for none.
        scores_N: the score of each row; NaN for none, which ranks nowhere.

    Returns:
        Rank, group size (rows without a score are counted) and margin (the group's best score minus the row's, so 0
        for the best; NaN without a rank) of each row.
    """
    order_N, starts_G = groups_of(keys_N2, scores_N)
    sizes_G = np.diff(np.append(starts_G, len(order_N)))
    places_N = np.arange(len(order_N)) - np.repeat(starts_G, sizes_G)
    sorted_N = scores_N[order_N]
    best_N = np.repeat(sorted_N[starts_G], sizes_G)
    has_group_N: NDArray[np.bool_] = np.asarray(keys_N2.any(axis=1))[order_N]
    ranked_N = ~np.isnan(sorted_N) & has_group_N

    def unsorted(values_N: NDArray[Any], kind: type[np.generic]) -> NDArray[Any]:
        result_N = np.empty(len(order_N), kind)
        result_N[order_N] = values_N
        return result_N

    return GroupRanks(
        rank=unsorted(np.where(ranked_N, places_N, -1), np.int32),
        group_size=unsorted(np.where(has_group_N, np.repeat(sizes_G, sizes_G), -1), np.int32),
        margin=unsorted(np.where(ranked_N, best_N - sorted_N, np.nan), np.float32),
    )


def groups_of(
    keys_N2: NDArray[np.uint64], scores_N: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows by group and, within one, from the highest score to the lowest, NaN last: their indices, and where each
    group starts among them. Equal scores keep the order given."""
    order_N = np.lexsort((-scores_N, keys_N2[:, 1], keys_N2[:, 0]))
    sorted_N2 = keys_N2[order_N]
    is_start_N = np.ones(len(order_N), bool)
    is_start_N[1:] = (sorted_N2[1:] != sorted_N2[:-1]).any(axis=1)
    return order_N, np.flatnonzero(is_start_N)


def best_rows(scores_N: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The indices of the `k` highest scores, in input order; of equal scores the first. NaN is no score."""
    scored = scores_N[~np.isnan(scores_N)]
    if len(scored) <= k:
        return np.flatnonzero(~np.isnan(scores_N))
    threshold = np.partition(scored, len(scored) - k)[len(scored) - k]
    above = np.flatnonzero(scores_N > threshold)
    equal = np.flatnonzero(scores_N == threshold)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))


RANK_COLUMNS = ("rank", "group_size", "margin")
MAX_TASKS = 200
# Pieces of less than 100 kB would be kept in the driver, so shares are large.
ROWS_PER_PARTITION = 1 << 20


@dataclass(frozen=True, slots=True)
class Stretch:
    """Units that one task reads, in order, and which of them it has still to write."""

    units: tuple[Unit, ...]
    left: frozenset[str]

    @property
    def num_rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)

    def placed(self) -> Iterator[tuple[Unit, int]]:
        """Each unit, and the place of its first row in the stretch."""
        return zip(self.units, accumulate((unit.num_rows for unit in self.units), initial=0), strict=False)


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Some rows of a stretch: their groups, scores (NaN for none) and places in the stretch, in input order."""

    keys: NDArray[np.uint64]
    scores: NDArray[np.float32]
    places: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts and scores that a stretch adds to the manifest."""

    scores: ScoreSummary
    unscored: int
    ungrouped: int


@dataclass(frozen=True, slots=True)
class _Ranks:
    """Ranks of some rows of a stretch, by their places."""

    places: NDArray[np.int64]
    rank: NDArray[np.int32]
    group_size: NDArray[np.int32]
    margin: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RankStage:
    """Ranks the rows of a corpus on the connected Ray and commits them with their ranks.

    `keys` is None where the whole corpus is one group; then `top_k` says how many rows are kept.
    """

    filesystem: fs.FileSystem
    ledger: Ledger
    keys: GroupKeys | None
    score_column: str
    prefix: str
    top_k: int | None

    def run(self, work: Sequence[Stretch], *, num_rows: int) -> Iterator[Summary | UnitStats]:
        """First the summary of each stretch, then the counts of each unit as it is committed.

        Raises:
            RaywardError: rows cannot be read or unit files not written. What is committed stays.
        """
        parts = 1 if self.keys is None else num_partitions(num_rows)
        keyed = scatter(partial(_keys, stage=self, num_parts=parts), work, num_parts=parts + 1)
        yield from results(keyed, part=parts, told="stretches of keys read")
        shares = gathered(keyed, parts)
        del keyed
        ranks = partial(_group_ranks, top_k=self.top_k, group_size=None if self.keys else num_rows)
        ranked = scatter(ranks, range(parts), num_parts=len(work), pieces=shares)
        left = [index for index, stretch in enumerate(work) if stretch.left]
        own = gathered(ranked, len(work))
        del ranked, shares
        written = scatter(
            partial(_write, stage=self), [work[index] for index in left], num_parts=1, pieces=[own[i] for i in left]
        )
        for stats in results(written):
            yield from stats


def stretches(units: Sequence[Unit], done: set[str]) -> list[Stretch]:
    """The units cut into at most about `MAX_TASKS` stretches."""
    return [Stretch(tuple(task), frozenset(unit.id for unit in task) - done) for task in read_tasks(units, MAX_TASKS)]


def num_partitions(num_rows: int) -> int:
    """In how many shares groups are ranked."""
    return min(MAX_TASKS, max(1, -(-num_rows // ROWS_PER_PARTITION)))


def scores_of(table: pa.Table, column: str) -> NDArray[np.float32]:
    """The scores of a table: NaN where there is none."""
    scores: NDArray[np.float32] = table.column(column).cast(pa.float32(), safe=False).to_numpy()
    return scores


def _keys(stretch: Stretch, _: object, *, stage: RankStage, num_parts: int) -> list[ScoredRows | Summary]:
    """The rows of a stretch split by share of the groups, and their summary as the last piece."""
    rows = scored_rows(stretch, filesystem=stage.filesystem, keys=stage.keys, score_column=stage.score_column)
    unscored, ungrouped = np.isnan(rows.scores), ~rows.keys.any(axis=1)
    summary = Summary(ScoreSummary.of(rows.scores), int(unscored.sum()), int(ungrouped.sum()))
    if stage.keys is None:
        assert stage.top_k is not None
        return [select(rows, best_rows(rows.scores, stage.top_k)), summary]
    return [*split(rows, num_parts), summary]


def scored_rows(
    stretch: Stretch, *, filesystem: fs.FileSystem, keys: GroupKeys | None, score_column: str
) -> ScoredRows:
    """The keys and scores of a stretch, one key for all where `keys` is None."""
    columns = sorted({score_column, *(keys.columns if keys else ())})
    found_keys, found_scores = [np.empty((0, 2), np.uint64)], [np.empty(0, np.float32)]
    for _, table in UnitReader(filesystem, columns=columns).read(stretch.units):
        if isinstance(table, Exception):
            raise table
        found_keys.append(keys.of(table) if keys else np.ones((table.num_rows, 2), np.uint64))
        found_scores.append(scores_of(table, score_column))
    scores = np.concatenate(found_scores)
    return ScoredRows(np.concatenate(found_keys), scores, np.arange(len(scores)))


def split(rows: ScoredRows, num_parts: int) -> list[ScoredRows]:
    """Rows by the share that their group belongs to, each in input order."""
    part_N = rows.keys[:, 0] % np.uint64(num_parts)
    order = np.argsort(part_N, kind="stable")
    ends = np.searchsorted(part_N[order], np.arange(num_parts), side="right")
    return [select(rows, chosen) for chosen in np.split(order, ends[:-1])]


def select(rows: ScoredRows, chosen: NDArray[np.int64]) -> ScoredRows:
    return ScoredRows(rows.keys[chosen], rows.scores[chosen], rows.places[chosen])


def joined(pieces: Sequence[ScoredRows]) -> tuple[ScoredRows, NDArray[np.int64]]:
    """Pieces one after the other, and where each ends."""
    ends = np.cumsum([len(piece.places) for piece in pieces])
    return ScoredRows(
        np.concatenate([piece.keys for piece in pieces]),
        np.concatenate([piece.scores for piece in pieces]),
        np.concatenate([piece.places for piece in pieces]),
    ), ends


def _group_ranks(_: int, pieces: Sequence[ScoredRows], *, top_k: int | None, group_size: int | None) -> list[_Ranks]:
    """The ranks of one share of the groups, split by stretch again; beyond `top_k` they are left out.

    `group_size` is that of the one group whose best rows alone have come.
    """
    rows, ends = joined(pieces)
    found = rank_groups(rows.keys, rows.scores)
    if group_size is not None:
        found = replace(found, group_size=np.full_like(found.group_size, group_size))
    kept = np.ones(len(rows.places), bool) if top_k is None else (found.rank >= 0) & (found.rank < top_k)
    return [
        _Ranks(rows.places[own], found.rank[own], found.group_size[own], found.margin[own])
        for own in (start + np.flatnonzero(kept[start:end]) for start, end in _ranges(ends))
    ]


def _ranges(ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    return zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)


def _write(stretch: Stretch, pieces: Sequence[_Ranks], *, stage: RankStage) -> list[list[UnitStats]]:
    """Commit the units of a stretch that are not done, each with its ranks."""
    columns = _rank_columns(stretch.num_rows, pieces)
    stats = []
    starts = {unit.id: start for unit, start in stretch.placed()}
    left = [unit for unit in stretch.units if unit.id in stretch.left]
    for unit, table in UnitReader(stage.filesystem).read(left):
        if isinstance(table, Exception):
            raise table
        own = columns.slice(starts[unit.id], unit.num_rows)
        for name in RANK_COLUMNS:
            table = table.append_column(stage.prefix + name, own.column(name))
        unscored = int(np.isnan(scores_of(table, stage.score_column)).sum())
        if stage.top_k is not None:
            table = table.filter(own.column("rank").is_valid())
        counts = UnitStats(rows=unit.num_rows, errors=unscored, left_out=unit.num_rows - table.num_rows)
        stage.ledger.commit(unit, table, counts)
        stats.append(counts)
    return [stats]


def _rank_columns(num_rows: int, pieces: Sequence[_Ranks]) -> pa.Table:
    """Rank, group size and margin of every row of a stretch, null where a row has none."""
    rank, size = np.full(num_rows, -1, np.int32), np.full(num_rows, -1, np.int32)
    margin = np.full(num_rows, np.nan, np.float32)
    for piece in pieces:
        rank[piece.places], size[piece.places] = piece.rank, piece.group_size
        margin[piece.places] = piece.margin
    return pa.table(
        {
            "rank": pa.array(rank, mask=rank < 0),
            "group_size": pa.array(size, mask=size < 0),
            "margin": pa.array(margin, mask=np.isnan(margin)),
        }
    )
