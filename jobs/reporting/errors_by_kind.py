"""Why rows have no score, by kind of error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from jobs.reporting.columns import ScoreColumn

__all__ = ["ErrorKind", "ErrorKinds"]

MAX_KINDS = 100
MAX_KIND_CHARS = 60
MAX_EXAMPLE_CHARS = 300
NO_REASON, NOT_FINITE, OTHERS = "(no reason given)", "(the score is not finite)", "(other kinds)"


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How many rows have an error of a kind, and the text of one: the first in the order of texts."""

    count: int
    example: str

    def __add__(self, other: ErrorKind) -> ErrorKind:
        return ErrorKind(self.count + other.count, min(self.example, other.example))


@dataclass(frozen=True, slots=True)
class ErrorKinds:
    """Rows without a score by the kind of their error: what stands before its colon, in `jobs.score` its type."""

    kinds: Mapping[str, ErrorKind] = field(default_factory=dict)

    @classmethod
    def of(cls, table: pa.Table, column: ScoreColumn) -> ErrorKinds:
        """Those of a table of rows that have no score."""
        kinds: dict[str, ErrorKind] = {}
        if not table.num_rows:
            return cls(kinds)
        texts = pa.nulls(table.num_rows, pa.large_string())
        if column.error is not None:
            texts = pc.cast(table.column(column.error), pa.large_string())
        reason = pc.if_else(pc.is_valid(table.column(column.name)), NOT_FINITE, NO_REASON)
        for entry in pc.value_counts(pc.coalesce(texts, reason)).to_pylist():
            text = entry["values"]
            kind = text if text in (NO_REASON, NOT_FINITE) else text.partition(":")[0].strip()[:MAX_KIND_CHARS]
            found = ErrorKind(entry["counts"], "" if kind == text else text[:MAX_EXAMPLE_CHARS])
            kinds[kind] = kinds[kind] + found if kind in kinds else found
        return cls(_bounded(kinds))

    def __add__(self, other: ErrorKinds) -> ErrorKinds:
        kinds = dict(self.kinds)
        for kind, found in other.kinds.items():
            kinds[kind] = kinds[kind] + found if kind in kinds else found
        return ErrorKinds(_bounded(kinds))

    @property
    def total(self) -> int:
        return sum(kind.count for kind in self.kinds.values())


def _bounded(kinds: dict[str, ErrorKind]) -> dict[str, ErrorKind]:
    """The most frequent kinds, and the others as one."""
    if len(kinds) <= MAX_KINDS:
        return kinds
    ordered = sorted(kinds.items(), key=lambda item: (item[0] == OTHERS, -item[1].count, item[0]))
    kept = dict(ordered[: MAX_KINDS - 1])
    left = [kind for _, kind in ordered[MAX_KINDS - 1 :]]
    return kept | {OTHERS: ErrorKind(sum(kind.count for kind in left), left[0].example)}
