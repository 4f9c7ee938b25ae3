"""The best and the worst rows of a corpus: first where they are, then what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.corpus.conversations import ConversationColumns
from jobs.grouping.ranks import best_rows
from jobs.reporting.columns import ReportColumns, ScoreColumn

MAX_PROMPT_CHARS = 240
MAX_RESPONSE_CHARS = 500
MAX_FACT_CHARS = 60


@dataclass(frozen=True, slots=True)
class RowPlace:
    """A row of the corpus: the `row`-th of a stretch, and its score."""

    score: float
    stretch: int
    row: int


@dataclass(frozen=True, slots=True)
class Extremes:
    """At most `k` rows of the highest scores, the best first, and of the lowest, the worst first.

    Of equal scores the row that stands first in the corpus counts.
    """

    k: int
    best: tuple[RowPlace, ...] = ()
    worst: tuple[RowPlace, ...] = ()

    @classmethod
    def of(cls, scores: NDArray[np.float32], *, stretch: int, first_row: int, k: int) -> Extremes:
        """Extremes of rows of a stretch from its `first_row`-th on; NaN is no score."""
        if not k:
            return cls(k)

        def places(rows: NDArray[np.int64]) -> list[RowPlace]:
            return [RowPlace(float(scores[row]), stretch, first_row + int(row)) for row in rows]

        return cls(k, *_ordered(places(best_rows(scores, k)), places(best_rows(-scores, k)), k))

    def __add__(self, other: Extremes) -> Extremes:
        return Extremes(self.k, *_ordered([*self.best, *other.best], [*self.worst, *other.worst], self.k))


def _ordered(best: list[RowPlace], worst: list[RowPlace], k: int) -> tuple[tuple[RowPlace, ...], tuple[RowPlace, ...]]:
    best.sort(key=lambda place: (-place.score, place.stretch, place.row))
    worst.sort(key=lambda place: (place.score, place.stretch, place.row))
    return tuple(best[:k]), tuple(worst[:k])


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row as a report shows it: the place in its file, its texts, shortened, and its values of other columns.

    A text is None where the row has none that can be read.
    """

    file: str
    row: int
    score: float
    facts: tuple[tuple[str, str], ...]
    prompt: str | None
    response: str | None


def text_columns(column: ScoreColumn, columns: ReportColumns) -> list[str]:
    """The columns that rows of a column of scores are shown with."""
    texts = column.texts
    label = columns.label.name if columns.label else None
    names = (column.name, column.tokens, texts.messages, texts.prompt, texts.response, label, *columns.by)
    return sorted({name for name in names if name})


def shown_row(
    cells: Mapping[str, Any], column: ScoreColumn, columns: ReportColumns, *, file: str, row: int
) -> ShownRow:
    """A row as it is shown, from its cells by column."""
    label = [columns.label.name] if columns.label else []
    facts = [
        (name, str(_shortened(str(cells[name]), MAX_FACT_CHARS)))
        for name in (*columns.by, *label)
        if cells[name] is not None
    ]
    if column.tokens and cells[column.tokens] is not None:
        facts.insert(0, ("tokens", f"{cells[column.tokens]:,}"))
    prompt, response = _texts(cells, column.texts)
    return ShownRow(
        file,
        row,
        float(cells[column.name]),
        tuple(facts),
        _shortened(prompt, MAX_PROMPT_CHARS),
        _shortened(response, MAX_RESPONSE_CHARS),
    )


def _texts(cells: Mapping[str, Any], texts: ConversationColumns) -> tuple[str | None, str | None]:
    """The last turn before the response, and the response."""
    if texts.messages is not None:
        contents = _contents(cells[texts.messages], may_be_json=True)
        return (contents[-2] if len(contents) > 1 else None), (contents[-1] if contents else None)
    if texts.response is None:
        return None, None
    prompts, responses = _contents(cells[str(texts.prompt)]), _contents(cells[texts.response])
    return (prompts[-1] if prompts else None), (responses[-1] if responses else None)


def _contents(cell: Any, *, may_be_json: bool = False) -> list[str]:
    """The texts of a cell's messages; a text that is not messages in JSON is one by itself."""
    turns = cell
    if isinstance(cell, str):
        try:
            turns = json.loads(cell) if may_be_json else None
        except (ValueError, RecursionError):
            turns = None
        if not isinstance(turns, list):
            return [cell]
    return [str(turn["content"]) for turn in turns or () if isinstance(turn, dict) and turn.get("content") is not None]


def _shortened(text: str | None, limit: int) -> str | None:
    """The beginning of a text, and how much more there is."""
    if text is None or len(text) <= limit * 1.1:
        return text
    return f"{text[:limit].rstrip()} \u2026 [{len(text) - limit:,} more characters]"
