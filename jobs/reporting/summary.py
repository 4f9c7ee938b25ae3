"""What was found, as a few lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.reporting import wording
from jobs.reporting.stage import Findings

__all__ = ["summary"]


def summary(findings: Findings) -> str:
    """A line for the rows, and some for each column of scores and each kind of pairs."""
    return "\n".join(_lines(findings)).replace("\u00a0", " ")


def _lines(findings: Findings) -> Iterator[str]:
    yield wording.count(findings.scales.num_rows, "row")
    for name, counts in findings.counts.items():
        scored = int(counts.scores.moments.count[0])
        yield f"{name}: {scored:,} scored, {findings.scales.num_rows - scored:,} not"
        if not scored:
            continue
        low, middle, high = (
            wording.score(findings.scales.scores[name].quantiles[share]) for share in ("0.05", "0.5", "0.95")
        )
        yield f"  median {middle}, 90 % from {low} to {high}"
        if counts.lengths is not None:
            yield f"  {wording.length_bias(counts.lengths)}"
        if findings.pairs is not None and name in findings.pairs.counts:
            yield f"  accuracy {wording.accuracy(findings.pairs.counts[name])}"
    if findings.columns.pair is not None and findings.pairs is not None:
        pair = findings.columns.pair.name
        yield f"{pair}: accuracy {wording.accuracy(findings.pairs.counts[pair])}"
