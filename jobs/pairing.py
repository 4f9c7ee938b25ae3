"""Preference pairs over a whole corpus: keys and scores are regrouped first, then the rows that a pair needs.

keys (a task for each stretch of the input) -> pairs (a task for each share of the prompts) -> the texts of their
rows (a task for each stretch) -> parts (a task for each share, which joins and commits them)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from operator import add
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import fs

from jobs.columns import ConversationColumns, conversations
from jobs.exchange import gathered, results, scatter
from jobs.group_keys import GroupKeys
from jobs.ledger import Ledger
from jobs.pair_selection import Strategy, select_pairs
from jobs.ranking import ScoredRows, Stretch, joined, scored_rows, split
from jobs.unit_reader import UnitReader
from serve_app.reward_model.conversation import Conversation, Message

__all__ = ["PAIR_SCHEMA", "PairStage", "PairStats"]

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
# TRL's conversational preference format: prompt, chosen and rejected are lists of messages.
PAIR_SCHEMA = pa.schema(
    [
        ("prompt", _MESSAGES),
        ("chosen", _MESSAGES),
        ("rejected", _MESSAGES),
        ("score_chosen", pa.float32()),
        ("score_rejected", pa.float32()),
        ("margin", pa.float32()),
    ]
)
_TEXTS = pa.schema([("place", pa.int64()), ("prompt", _MESSAGES), ("response", _MESSAGES)])


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
    """Makes pairs of a scored corpus on the connected Ray and commits them, a part for each share of the prompts."""

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

    def part_path(self, share: int, num_shares: int) -> str:
        """Where the pairs of a share are."""
        return f"{self.ledger.folder}/part-{share:05d}-of-{num_shares:05d}.parquet"

    def done(self, num_shares: int) -> dict[int, PairStats]:
        """The counts of the shares whose parts are there."""
        found = {
            share: self.ledger.part_stats(self.part_path(share, num_shares), PairStats) for share in range(num_shares)
        }
        return {share: part[0] for share, part in found.items() if part is not None and part[0].pairs == part[1]}

    def run(self, work: Sequence[Stretch], *, shares: Sequence[int], num_shares: int) -> Iterator[PairStats]:
        """Commit the pairs of `shares`, yielding the counts of each as it is committed.

        Raises:
            RaywardError: rows cannot be read or parts not written. What is committed stays.
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
        paths = [self.part_path(share, num_shares) for share in shares]
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
    prompts = [row and _messages(row.prompt) for row in rows]
    responses = [row and _messages([row.response]) for row in rows]
    return pa.table([pa.array(places), pa.array(prompts, _MESSAGES), pa.array(responses, _MESSAGES)], schema=_TEXTS)


def _messages(messages: Sequence[Message]) -> list[dict[str, str]]:
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
    readable = table.filter(pc.and_(table.column("chosen").is_valid(), table.column("rejected").is_valid()))
    unreadable = table.num_rows - readable.num_rows
    counts = PairStats(pairs.prompts, pairs.paired, readable.num_rows, unreadable)
    stage.ledger.commit_part(path, readable, counts)
    return [counts]
