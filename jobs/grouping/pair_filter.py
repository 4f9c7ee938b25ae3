"""Pairs that have their scores: those that a reward model agrees with are kept, or turned round, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
from pyarrow import fs

from jobs.corpus.preferences import PreferenceColumns, Sides, preference_pairs
from jobs.corpus.reader import UnitReader
from jobs.grouping.pairs import PAIR_SCHEMA, messages_of_turns
from jobs.grouping.ranks import Stretch, scores_of
from jobs.runs.exchange import results, scatter
from jobs.runs.ledger import Ledger, UnitStats
from serve_app.reward_model.conversation import Conversation, Message

Disagreement = Literal["drop", "keep", "flip"]


@dataclass(frozen=True, slots=True)
class PairFilterStage:
    """Keeps the pairs of a corpus by their margin, chosen minus rejected, and commits them in the `PAIR_SCHEMA`.

    Pairs whose scores differ by `min_margin` or less go. Where the rejected side scores more, the model disagrees with
    the label: such a pair is dropped, kept as it is, or its sides are exchanged.
    """

    filesystem: fs.FileSystem
    ledger: Ledger
    columns: PreferenceColumns
    score_columns: tuple[str, str]
    min_margin: float
    disagreement: Disagreement

    def run(self, work: Sequence[Stretch]) -> Iterator[UnitStats]:
        """Commit the units that are left on the connected Ray, yielding the counts of each.

        Raises:
            RaywardError: rows cannot be read or unit files not written. What is committed stays.
        """
        left = [stretch for stretch in work if stretch.left]
        for made in results(scatter(partial(_work, stage=self), left, num_parts=1)):
            yield from made

    def kept(self, table: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """The pairs of a table that are kept, in input order, and the counts `unscored`, `disagreeing` (in all),
        `flipped` and `unreadable` (scored, but no conversation)."""
        chosen_N, rejected_N = (scores_of(table, name) for name in self.score_columns)
        margin_N = chosen_N - rejected_N
        wrong_N = margin_N < 0
        fits_N = np.abs(margin_N) > self.min_margin
        if self.disagreement == "drop":
            fits_N &= ~wrong_N
        places = np.flatnonzero(fits_N)
        flips = wrong_N[places] if self.disagreement == "flip" else np.zeros(len(places), bool)
        rows = preference_pairs(table.take(places), self.columns)
        texts = [_texts(sides[::-1] if flip else sides) for sides, flip in zip(rows, flips.tolist(), strict=True)]
        readable = [place for place, text in enumerate(texts) if text is not None]
        own, flips = places[readable], flips[readable]
        scores = np.where(flips, rejected_N[own], chosen_N[own]), np.where(flips, chosen_N[own], rejected_N[own])
        found = [text for text in texts if text is not None]
        columns = [[messages_of_turns(text[part]) for text in found] for part in range(3)]
        arrays = [pa.array(column, PAIR_SCHEMA.types[0]) for column in columns]
        arrays += [pa.array(side, pa.float32()) for side in (*scores, scores[0] - scores[1])]
        counts = {
            "unscored": int(np.isnan(margin_N).sum()),
            "disagreeing": int(wrong_N.sum()),
            "flipped": int(flips.sum()),
            "unreadable": len(places) - len(own),
        }
        return pa.table(arrays, schema=PAIR_SCHEMA), counts


def _texts(sides: Sides) -> tuple[Sequence[Message], Sequence[Message], Sequence[Message]] | None:
    """The messages that both sides begin with, and what each adds to them; None where a side cannot be read."""
    chosen, rejected = sides
    if not (isinstance(chosen, Conversation) and isinstance(rejected, Conversation)):
        return None
    one, other = chosen.messages, rejected.messages
    shared = next(
        (place for place, (own, its) in enumerate(zip(one[:-1], other[:-1], strict=False)) if own != its),
        min(len(one), len(other)) - 1,
    )
    return one[:shared], one[shared:], other[shared:]


def _work(stretch: Stretch, _: object, *, stage: PairFilterStage) -> list[list[UnitStats]]:
    made = []
    for unit, table in UnitReader(stage.filesystem).read([unit for unit in stretch.units if unit.id in stretch.left]):
        if isinstance(table, Exception):
            raise table
        found, counts = stage.kept(table)
        stats = UnitStats(
            rows=unit.num_rows, errors=counts["unscored"], left_out=unit.num_rows - len(found), counts=counts
        )
        stage.ledger.commit(unit, found, stats)
        made.append(stats)
    return [made]
