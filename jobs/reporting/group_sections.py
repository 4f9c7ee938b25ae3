"""Domains, languages and other groups side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from jobs.reporting import wording
from jobs.reporting.figures import GroupLine, group_lines
from jobs.reporting.histogram import quantile
from jobs.reporting.page import Figure, Section, Table
from jobs.reporting.pair_figures import accuracy_by_group
from jobs.reporting.stage import Findings
from jobs.reporting.svg import inline

__all__ = ["group_sections", "pair_sections"]

MAX_DRAWN = 24
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


def group_sections(findings: Findings, name: str, *, anchor: str, prefix: str) -> Iterator[Section]:
    """For each column of groups one that compares the scores in the column `name`."""
    for place, column in enumerate(findings.columns.by):
        if len(findings.scales.values[column] or ()) > 1:
            yield _section(findings, name, column, anchor=f"{anchor}-by{place}", prefix=prefix)


def pair_sections(findings: Findings, name: str) -> Iterator[Section]:
    """For each column of groups one that compares the pairs `name`, of which each row is one."""
    assert findings.pairs is not None
    for place, (column, pairs) in enumerate(findings.pairs.counts[name].by.items()):
        values = findings.scales.values[column] or ()
        by_count: list[int] = np.argsort(-pairs[0], kind="stable").tolist()
        there = [index for index in by_count if pairs[0, index]]
        if len(there) > 1:
            anchor = f"pairs-by{place}"
            drawn = sorted(there[:MAX_DRAWN], key=lambda index: -pairs[1, index] / pairs[0, index])
            rows = [[values[index], *_accuracy(pairs, index)] for index in there]
            summary = f"{wording.count(len(there), 'value')} of {column} as a table"
            yield Section(
                anchor,
                f"Pairs by {column}",
                figures=[_accuracies(values, drawn, pairs, column=column, anchor=anchor)],
                tables=[Table([column, "pairs", "accuracy"], rows, summary=summary)],
            )


def _section(findings: Findings, name: str, column: str, *, anchor: str, prefix: str) -> Section:
    counts, values = findings.counts[name].by[column], findings.scales.values[column] or ()
    axis = findings.scales.scores[name].axis
    lines = [
        GroupLine(value, tuple(quantile(axis, own, share) for share in SHARES))  # type: ignore[arg-type]
        for value, own in zip(values, counts.histogram, strict=True)
    ]
    by_count: list[int] = np.argsort(-counts.moments.count, kind="stable").tolist()
    there = [place for place in by_count if counts.moments.count[place]]
    # The most frequent ones are drawn; the highest median is on top.
    drawn = sorted(there[:MAX_DRAWN], key=lambda place: -lines[place].quantiles[2])
    figures = [
        Figure(
            f"Scores by {column}",
            inline(group_lines([lines[place] for place in drawn], axis), name=anchor, title=f"Scores by {column}"),
            "Dot: the median; bar: the middle half; line: the middle 90\u00a0%." + _beyond(len(there)),
        )
    ]
    pairs = findings.pairs.counts[name].by[column] if findings.pairs and name in findings.pairs.counts else None
    if pairs is not None and pairs[0].any():
        figures.append(_accuracies(values, drawn, pairs, column=column, anchor=anchor))
    heads = [column, "rows", "mean", "sd", "5 %", "25 %", "median", "75 %", "95 %"]
    rows = []
    for place in sorted(there, key=lambda place: -lines[place].quantiles[2]):
        moments = counts.moments
        figures_of = (moments.mean[place], moments.deviation[place], *lines[place].quantiles)
        row = [values[place], f"{moments.count[place]:,}", *(wording.score(float(value)) for value in figures_of)]
        rows.append([*row, *(_accuracy(pairs, place) if pairs is not None else ())])
    heads += ["pairs", "accuracy"] if pairs is not None else []
    table = Table(heads, rows, summary=f"{wording.count(len(there), 'value')} of {column} as a table")
    return Section(anchor, f"{prefix}By {column}", figures=figures, tables=[table])


def _accuracies(
    values: Sequence[str], drawn: Sequence[int], pairs: NDArray[np.float64], *, column: str, anchor: str
) -> Figure:
    shown = [place for place in drawn if pairs[0, place]][:MAX_DRAWN]
    figure = accuracy_by_group([values[place] for place in shown], pairs[0, shown], pairs[1, shown])
    return Figure(
        f"Accuracy by {column}",
        inline(figure, name=f"{anchor}-accuracy", title=f"Accuracy by {column}"),
        "With 95\u00a0% intervals; dashed: chance. A pair counts where its chosen response does.",
    )


def _accuracy(pairs: NDArray[np.float64], place: int) -> tuple[str, str]:
    number, right = pairs[:, place]
    return f"{int(number):,}", wording.percent(right / number) if number else "\u2013"


def _beyond(number: int) -> str:
    return f" The {MAX_DRAWN} most frequent of {number}." if number > MAX_DRAWN else ""
