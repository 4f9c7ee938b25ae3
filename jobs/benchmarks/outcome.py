"""The outcome of a benchmark: plain data, from a row's answers up to the final score. Fractions from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class AnsweredRow:
    """A row of the dataset with the score of each of its answers, the `num_correct` right ones first.

    `row` is its 0-based place in the input. `error` says why an answer has no score (its place in `scores` is None
    then), or why the row has no answers at all.
    """

    row: int
    id: str | None
    subset: str
    num_correct: int
    scores: tuple[float | None, ...]
    error: str | None = None

    @property
    def right(self) -> tuple[float, ...]:
        """The right answers' scores, or nothing where the row is not scored whole."""
        return self._complete[: self.num_correct]

    @property
    def wrong(self) -> tuple[float, ...]:
        """The wrong answers' scores, or nothing where the row is not scored whole."""
        return self._complete[self.num_correct :]

    @property
    def gap(self) -> float | None:
        """The worst right score minus the best wrong one, or None where the row is not scored whole."""
        return min(self.right) - max(self.wrong) if self.right and self.wrong else None

    @property
    def _complete(self) -> tuple[float, ...]:
        scores = tuple(score for score in self.scores if score is not None and not math.isnan(score))
        return scores if len(scores) == len(self.scores) else ()


@dataclass(frozen=True, slots=True)
class Subset:
    """A subset: its rows here and in the benchmark (None where the benchmark has no such subset), and its score.

    `num_unscored` rows have an answer without a score; they count as wrong.
    """

    name: str
    num_rows: int
    benchmark_rows: int | None
    num_unscored: int
    score: float | None

    @property
    def is_whole(self) -> bool:
        return self.num_rows == self.benchmark_rows and self.score is not None


@dataclass(frozen=True, slots=True)
class Section:
    """A figure of the leaderboard, over `subsets`: those of them that the dataset has. None where it has none."""

    name: str
    score: float | None
    subsets: tuple[Subset, ...]

    @property
    def missing(self) -> list[str]:
        """Its subsets that have no score."""
        return [subset.name for subset in self.subsets if subset.score is None]

    @property
    def is_whole(self) -> bool:
        """Whether it stands on the benchmark's own number of rows in every subset."""
        return all(subset.is_whole for subset in self.subsets)


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures to hold the outcome against: the final score and each section's, None where there is none."""

    name: str
    score: float | None
    sections: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A benchmark's figures for a dataset.

    `row_name` is what the benchmark calls a row. `score` is the mean of all sections, None where a subset is missing.
    `others` are subsets that the benchmark does not have; they count in no section. `notes` say what else a reader of
    the figures has to know.
    """

    benchmark: str
    row_name: str
    score: float | None
    sections: tuple[Section, ...]
    others: tuple[Subset, ...]
    comparisons: tuple[Figures, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def subsets(self) -> tuple[Subset, ...]:
        return (*(subset for section in self.sections for subset in section.subsets), *self.others)


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean, None of nothing."""
    return float(np.mean(values)) if values else None


def subsets_of(rows: Iterable[AnsweredRow], benchmark_rows: Mapping[str, int]) -> dict[str, list[AnsweredRow]]:
    """The rows of each subset: the benchmark's in its order, where there are none too, then others by name."""
    grouped: dict[str, list[AnsweredRow]] = {name: [] for name in benchmark_rows}
    for row in rows:
        grouped.setdefault(row.subset, []).append(row)
    others = sorted(grouped.keys() - benchmark_rows.keys())
    return {name: grouped[name] for name in [*benchmark_rows, *others]}
