"""Ranks of candidates that stand in lists, one row a prompt: each becomes a row of its own, next to those of its list.

No rows have to meet, so that every unit is ranked by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from jobs.corpus.candidates import CandidateColumns, candidate_rows, hold_messages, text_field
from jobs.corpus.conversations import is_list
from jobs.corpus.reader import UnitReader
from jobs.corpus.turns import cells
from jobs.grouping.pairs import MESSAGES, messages_of_turns
from jobs.grouping.quantiles import ScoreSummary
from jobs.grouping.ranks import RANK_COLUMNS, Stretch, Summary, rank_groups
from jobs.runs.exchange import results, scatter
from jobs.runs.ledger import Ledger, UnitStats
from serve_app.reward_model.conversation import Conversation

PLACE = "candidate"
"""The column of a candidate's place in its list."""


@dataclass(frozen=True, slots=True)
class CandidateRankStage:
    """Makes a row of each candidate of a scored corpus, ranks it within its list, and commits it.

    `score_column` has lists of scores; beside it, under the same prefix, stand those of token counts and the like.
    """

    filesystem: fs.FileSystem
    ledger: Ledger
    columns: CandidateColumns
    score_column: str
    prefix: str
    top_k: int | None

    def run(self, work: Sequence[Stretch], *, num_rows: int) -> Iterator[Summary | UnitStats]:
        """The summary of each stretch and the counts of its units as they are committed, on the connected Ray.

        Raises:
            RaywardError: rows cannot be read or unit files not written. What is committed stays.
        """
        for made in results(scatter(partial(_work, stage=self), work, num_parts=1)):
            yield from made

    def added(self, schema: pa.Schema) -> list[str]:
        """Names of the columns that the output has over those of its input."""
        listed = [*self._listed(schema), *([PLACE, *self._texts(schema)])]
        return [*dict.fromkeys(listed), *(self.prefix + name for name in RANK_COLUMNS)]

    def dropped(self, schema: pa.Schema) -> set[str]:
        """Names of the columns that the candidates' own take the place of."""
        best = f"{self.own_prefix}best"
        return {
            self.score_column,
            self.columns.responses,
            *self._listed(schema).values(),
            *({best} & set(schema.names)),
        }

    @property
    def own_prefix(self) -> str:
        """What stands before `scores` in the name of the column."""
        return self.score_column.removesuffix("scores")

    def _listed(self, schema: pa.Schema) -> dict[str, str]:
        """Columns of lists with an element for each candidate: the name of its element, and the column's own."""
        own = {f"{self.own_prefix}score": self.score_column}
        for name in ("num_tokens", "truncated", "attributes"):
            full = f"{self.own_prefix}{name}"
            if full in schema.names and is_list(schema.field(full).type):
                own[full] = full
        return own

    def _texts(self, schema: pa.Schema) -> list[str]:
        """Names of the columns that hold a candidate: its text, with its struct, or its whole conversation."""
        kind = schema.field(self.columns.responses).type
        if hold_messages(kind):
            return ["messages"]
        return ["response", f"{self.columns.responses}_item"] if text_field(kind.value_type) else ["response"]

    def ranked(self, table: pa.Table) -> tuple[pa.Table, Summary, int]:
        """A row for each candidate of a table, in order, with its rank, and how many there are; those beyond `top_k`
        are left out.

        A row without candidates stays as one without a response; with `top_k` it goes, as all without a score do.
        """
        lists = table.column(self.score_column).to_pylist()
        lengths = [len(scores) if scores else 0 for scores in lists]
        row_C = np.repeat(np.arange(len(lists)), [max(1, length) for length in lengths])
        has_C = np.repeat(np.array([length > 0 for length in lengths], bool), [max(1, length) for length in lengths])
        flat = [score for scores in lists for score in (scores or [None])]
        scores_C = np.array([np.nan if score is None else score for score in flat], np.float32)
        keys_C2 = np.stack([np.where(has_C, row_C + 1, 0), np.zeros_like(row_C)], axis=1).astype(np.uint64)
        ranks = rank_groups(keys_C2, scores_C)
        place_C = np.arange(len(row_C)) - np.searchsorted(row_C, row_C)
        found = self._exploded(table, row_C, lengths, pa.array(place_C, pa.int32(), mask=~has_C))
        if (error := f"{self.own_prefix}error") in found.column_names:
            reasons = zip(found.column(error).to_pylist(), np.isnan(scores_C).tolist(), strict=True)
            own = pa.array([reason if failed else None for reason, failed in reasons], pa.string())
            found = found.set_column(found.column_names.index(error), error, own)
        new = {
            "rank": pa.array(ranks.rank, mask=ranks.rank < 0),
            "group_size": pa.array(ranks.group_size, mask=ranks.group_size < 0),
            "margin": pa.array(ranks.margin, mask=np.isnan(ranks.margin)),
        }
        for name in RANK_COLUMNS:
            found = found.append_column(self.prefix + name, new[name])
        if self.top_k is not None:
            found = found.filter(pa.array((ranks.rank >= 0) & (ranks.rank < self.top_k)))
        summary = Summary(ScoreSummary.of(scores_C), int(np.isnan(scores_C).sum()), lengths.count(0))
        return found, summary, len(scores_C)

    def _exploded(self, table: pa.Table, row_C: Any, lengths: Sequence[int], places: pa.Array) -> pa.Table:
        """The rows of all candidates: what the row has for all of them, and what each has for itself."""
        dropped = self.dropped(table.schema)
        common = table.select([name for name in table.column_names if name not in dropped]).take(pa.array(row_C))
        common = common.append_column(PLACE, places)
        for name, array in self._texts_of(table, lengths).items():
            common = common.append_column(name, array)
        for name, column in self._listed(table.schema).items():
            kind = table.schema.field(column).type.value_type
            common = common.append_column(name, _elements(table.column(column).to_pylist(), lengths, kind))
        return common

    def _texts_of(self, table: pa.Table, lengths: Sequence[int]) -> dict[str, pa.Array]:
        kind = table.schema.field(self.columns.responses).type
        names = self._texts(table.schema)
        if names == ["messages"]:
            rows = [row if isinstance(row, list) else [] for row in candidate_rows(table, self.columns)]
            turns = [[_messages(candidate) for candidate in row] for row in rows]
            return {"messages": _elements(turns, lengths, MESSAGES)}
        element = kind.value_type
        lists = cells(table.column(self.columns.responses))
        field = text_field(element)
        if field is None:
            return {"response": _elements(lists, lengths, element)}
        texts = [[item and item[field] for item in row] if isinstance(row, list) else None for row in lists]
        return {
            "response": _elements(texts, lengths, element.field(field).type),
            names[1]: _elements(lists, lengths, element),
        }


def _messages(candidate: object) -> list[dict[str, str]] | None:
    return messages_of_turns(candidate.messages) if isinstance(candidate, Conversation) else None


def _elements(rows: Sequence[Any], lengths: Sequence[int], kind: pa.DataType) -> pa.Array:
    """The elements of lists one after the other: nulls for a list that cannot be read, one for an empty one."""
    lists = (
        row if isinstance(row, list) and len(row) == length > 0 else [None] * max(1, length)
        for row, length in zip(rows, lengths, strict=True)
    )
    return pa.array([item for row in lists for item in row], kind)


def _work(stretch: Stretch, _: object, *, stage: CandidateRankStage) -> list[list[Summary | UnitStats]]:
    made: list[Summary | UnitStats] = []
    for unit, table in UnitReader(stage.filesystem).read(stretch.units):
        if isinstance(table, Exception):
            raise table
        found, summary, num_candidates = stage.ranked(table)
        made.append(summary)
        if unit.id in stretch.left:
            counts = {"added_rows": found.num_rows - unit.num_rows, "candidates": num_candidates}
            stats = UnitStats(rows=unit.num_rows, errors=summary.unscored, counts=counts)
            stage.ledger.commit(unit, found, stats)
            made.append(stats)
    return [made]
