"""Preference pairs: which candidates make them, as pure functions of arrays, and over a whole corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from operator import add
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from jobs.corpus.conversations import ConversationColumns, conversations
from jobs.corpus.reader import UnitReader
from jobs.grouping.keys import GroupKeys
from jobs.grouping.ranks import ScoredRows, Stretch, groups_of, joined, scored_rows, split
from jobs.runs.exchange import gathered, results, scatter
from jobs.runs.ledger import Ledger
from serve_app.reward_model.conversation import Conversation, Message

Strategy = Literal["best-worst", "best-random", "all"]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of rows by their indices. Those of a group stand together, the widest margin first."""

    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]
    num_groups: int
    num_paired: int
    """Groups that have at least one pair."""


@dataclass(frozen=True, slots=True)
class _Groups:
    """Scored rows by group, the best first: `order` are their indices, a group starts at `starts` and has `sizes`."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    scores: NDArray[np.float32]


def select_pairs(
    keys_N2: NDArray[np.uint64],
    scores_N: NDArray[np.float32],
    *,
    strategy: Strategy,
    min_margin: float,
    max_pairs: int,
    seed: int,
) -> Pairs:
    """Pairs of rows of one group whose scores differ by more than `min_margin`.

    Args:
        keys_N2: the group of each row; two zeros for none.
        scores_N: the score of each row; NaN for none.
        strategy: `best-worst`; `best-random`, where the rejected ones are drawn without repetition; or `all`, of which
            those with the widest margins are taken.
        min_margin: 0 or more; equal scores never make a pair.
        max_pairs: pairs of one group at most.
        seed: decides what `best-random` draws, together with the group and the places of its rows.

    Returns:
        The pairs, groups in the order of their first row.
    """
    groups = _scored_groups(keys_N2, scores_N)
    if strategy == "best-worst":
        group, chosen, rejected = _best_worst(groups)
    elif strategy == "best-random":
        group, chosen, rejected = _best_random(groups, keys_N2, min_margin, max_pairs, seed)
    else:
        group, chosen, rejected = _widest(groups, max_pairs)
    margin = groups.scores[chosen] - groups.scores[rejected]
    wide = margin > min_margin
    group, chosen, rejected, margin = group[wide], chosen[wide], rejected[wide], margin[wide]
    first_row = np.minimum.reduceat(groups.order, groups.starts) if len(groups.starts) else groups.starts
    by_group = np.lexsort((rejected, chosen, -margin, first_row[group]))
    kept = by_group[_place_in_run(group[by_group]) < max_pairs]
    return Pairs(
        chosen=groups.order[chosen[kept]],
        rejected=groups.order[rejected[kept]],
        num_groups=len(groups.starts),
        num_paired=len(np.unique(group[kept])),
    )


def _scored_groups(keys_N2: NDArray[np.uint64], scores_N: NDArray[np.float32]) -> _Groups:
    scored = np.flatnonzero(~np.isnan(scores_N) & np.asarray(keys_N2.any(axis=1)))
    order, starts = groups_of(keys_N2[scored], scores_N[scored])
    rows = scored[order]
    return _Groups(rows, starts, np.diff(np.append(starts, len(rows))), scores_N[rows])


_Choice = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]  # group, place of chosen, place of rejected


def _best_worst(groups: _Groups) -> _Choice:
    return np.arange(len(groups.starts)), groups.starts, groups.starts + groups.sizes - 1


def _best_random(groups: _Groups, keys_N2: NDArray[np.uint64], min_margin: float, max_pairs: int, seed: int) -> _Choice:
    """The best row of each group against those with the smallest of pseudo-random numbers."""
    group = np.repeat(np.arange(len(groups.starts)), groups.sizes)
    best = np.repeat(groups.starts, groups.sizes)
    places = np.arange(len(group))
    eligible = np.flatnonzero(groups.scores[best] - groups.scores > min_margin)
    in_group = (places - best).astype(np.uint64)
    drawn = _mixed(keys_N2[groups.order, 1] + _mixed(in_group + np.uint64(seed)))[eligible]
    order = eligible[np.lexsort((drawn, group[eligible]))]
    kept = order[_place_in_run(group[order]) < max_pairs]
    return group[kept], best[kept], kept


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Pseudo-random numbers, the same for the same values: SplitMix64 (Steele, Lea, Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _widest(groups: _Groups, max_pairs: int) -> _Choice:
    """Pairs among which the `max_pairs` widest of each group are.

    Of the i-th best against the j-th worst, (i + 1)(j + 1) - 1 other pairs are as wide or wider; so those with
    (i + 1)(j + 1) <= max_pairs hold the widest.
    """
    found: list[_Choice] = []
    for i in range(max_pairs):
        for j in range(max_pairs // (i + 1)):
            (group,) = np.nonzero(groups.sizes >= i + j + 2)
            if not len(group):
                break
            start = groups.starts[group]
            found.append((group, start + i, start + groups.sizes[group] - 1 - j))
    empty = np.empty(0, np.int64)
    return tuple(np.concatenate([empty, *(choice[part] for choice in found)]) for part in range(3))  # type: ignore[return-value]


def _place_in_run(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each element in its run of equal ones."""
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])) if len(values) else values
    return np.arange(len(values)) - np.repeat(starts, np.diff(np.append(starts, len(values))))


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""The type of a column of messages."""
# TRL's conversational preference format: prompt, chosen and rejected are lists of messages.
PAIR_SCHEMA = pa.schema(
    [
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("score_chosen", pa.float32()),
        ("score_rejected", pa.float32()),
        ("margin", pa.float32()),
    ]
)
_TEXTS = pa.schema([("place", pa.int64()), ("prompt", MESSAGES), ("response", MESSAGES)])


@dataclass(frozen=True, slots=True)
class PairStats:
    """Counts of a share of the prompts: those with scored candidates, those with a pair, and the pairs.

    `unreadable` pairs are left out: their rows have a score, but no conversation.
    """

    prompts: int = 0
    paired: int = 0
    pairs: int = 0
    unreadable: int = 0

    def __add__(self, other: PairStats) -> PairStats:
        return PairStats(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The pairs of a share of the prompts: for each side the stretch, the place in it, and the score."""

    stretches: NDArray[np.int64]
    places: NDArray[np.int64]
    scores: NDArray[np.float32]
    prompts: int
    paired: int


@dataclass(frozen=True, slots=True)
class PairStage:
    """Makes pairs of a scored corpus on the connected Ray and commits a unit file for each share of the prompts."""

    filesystem: fs.FileSystem
    ledger: Ledger
    columns: ConversationColumns
    score_column: str
    strategy: Strategy
    min_margin: float
    max_pairs: int
    seed: int

    @property
    def keys(self) -> GroupKeys:
        return GroupKeys(None, self.columns)

    def file_path(self, share: int, num_shares: int) -> str:
        """Where the pairs of a share are."""
        return f"{self.ledger.folder}/part-{share:05d}-of-{num_shares:05d}.parquet"

    def done(self, num_shares: int) -> dict[int, PairStats]:
        """Counts of the shares whose files are there."""
        found = {
            share: self.ledger.file_stats(self.file_path(share, num_shares), PairStats) for share in range(num_shares)
        }
        return {share: part[0] for share, part in found.items() if part is not None and part[0].pairs == part[1]}

    def run(self, work: Sequence[Stretch], *, shares: Sequence[int], num_shares: int) -> Iterator[PairStats]:
        """Commit the pairs of `shares`, yielding the counts of each as it is committed.

        Raises:
            RaywardError: rows cannot be read or unit files not written. What is committed stays.
        """
        keyed = scatter(partial(_keys, stage=self, num_parts=num_shares), work, num_parts=num_shares)
        for _ in results(keyed, told="stretches of keys read"):
            pass
        wanted = [gathered(keyed, num_shares)[share] for share in shares]
        paired = scatter(partial(_choose, stage=self), shares, num_parts=len(work) + 1, pieces=wanted)
        requests = gathered(paired, len(work) + 1)
        texts = scatter(partial(_read_texts, stage=self), work, num_parts=len(shares), pieces=requests[:-1])
        for _ in results(texts, told="stretches of texts read"):
            pass
        joins = [[pairs, *own] for pairs, own in zip(requests[-1], gathered(texts, len(shares)), strict=True)]
        paths = [self.file_path(share, num_shares) for share in shares]
        yield from results(scatter(partial(_commit, stage=self), paths, num_parts=1, pieces=joins))


def _keys(stretch: Stretch, _: object, *, stage: PairStage, num_parts: int) -> list[ScoredRows]:
    rows = scored_rows(stretch, filesystem=stage.filesystem, keys=stage.keys, score_column=stage.score_column)
    return split(rows, num_parts)


def _choose(_: int, pieces: Sequence[ScoredRows], *, stage: PairStage) -> list[NDArray[np.int64] | _Chosen]:
    """For each stretch the places of the rows that pairs need, and the pairs as the last piece."""
    rows, ends = joined(pieces)
    pairs = select_pairs(
        rows.keys,
        rows.scores,
        strategy=stage.strategy,
        min_margin=stage.min_margin,
        max_pairs=stage.max_pairs,
        seed=stage.seed,
    )
    both = np.stack([pairs.chosen, pairs.rejected])
    stretches, places = np.searchsorted(ends, both, side="right"), rows.places[both]
    requests = [np.unique(places[stretches == index]) for index in range(len(pieces))]
    return [*requests, _Chosen(stretches, places, rows.scores[both], pairs.num_groups, pairs.num_paired)]


def _read_texts(stretch: Stretch, wanted: Sequence[NDArray[np.int64]], *, stage: PairStage) -> list[pa.Table]:
    """The prompts and responses of the rows that each share wants."""
    columns = sorted({name for name in (stage.columns.messages, stage.columns.prompt, stage.columns.response) if name})
    needed = np.unique(np.concatenate([np.empty(0, np.int64), *wanted]))
    starts = {
        unit.id: start
        for unit, start in stretch.placed()
        if np.searchsorted(needed, start) < np.searchsorted(needed, start + unit.num_rows)
    }
    read = [_TEXTS.empty_table()]
    units = [unit for unit in stretch.units if unit.id in starts]
    for unit, table in UnitReader(stage.filesystem, columns=columns).read(units):
        if isinstance(table, Exception):
            raise table
        start = starts[unit.id]
        own = needed[(needed >= start) & (needed < start + unit.num_rows)]
        read.append(_texts(table.take(own - start), own, stage.columns))
    texts = pa.concat_tables(read)
    return [texts.take(np.searchsorted(needed, places)) for places in wanted]


def _texts(table: pa.Table, places: NDArray[np.int64], columns: ConversationColumns) -> pa.Table:
    """Prompt and response of each row as messages; both null where they cannot be read."""
    rows = [row if isinstance(row, Conversation) else None for row in conversations(table, columns)]
    prompts = [row and messages_of_turns(row.prompt) for row in rows]
    responses = [row and messages_of_turns([row.response]) for row in rows]
    return pa.table([pa.array(places), pa.array(prompts, MESSAGES), pa.array(responses, MESSAGES)], schema=_TEXTS)


def messages_of_turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as a cell of the type `MESSAGES`."""
    return [{"role": message.role, "content": message.content} for message in messages]


def _commit(path: str, pieces: Sequence[Any], *, stage: PairStage) -> list[PairStats]:
    """Join the pairs of a share with their texts and write them."""
    pairs: _Chosen = pieces[0]
    texts: Sequence[pa.Table] = pieces[1:]
    starts = np.cumsum([0, *(table.num_rows for table in texts)])
    rows = np.empty_like(pairs.places)
    for index, table in enumerate(texts):
        here = pairs.stretches == index
        rows[here] = starts[index] + np.searchsorted(table.column("place").to_numpy(), pairs.places[here])
    chosen, rejected = (pa.concat_tables([_TEXTS.empty_table(), *texts]).take(side) for side in rows)
    scores = pairs.scores
    columns = [
        chosen.column("prompt"),
        chosen.column("response"),
        rejected.column("response"),
        *(pa.array(side) for side in scores),
        pa.array(scores[0] - scores[1]),
    ]
    table = pa.table(columns, schema=PAIR_SCHEMA)
    import pyarrow.compute as pc  # takes as long as all else here together

    readable = table.filter(pc.and_(table.column("chosen").is_valid(), table.column("rejected").is_valid()))
    unreadable = table.num_rows - readable.num_rows
    counts = PairStats(pairs.prompts, pairs.paired, readable.num_rows, unreadable)
    stage.ledger.commit_file(path, readable, counts)
    return [counts]
