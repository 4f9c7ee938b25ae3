"""The report as a page: one file, nothing loaded from elsewhere, no scripts, every text escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jobs.reporting import wording
from jobs.reporting.stage import Findings


@dataclass(frozen=True, slots=True)
class Tile:
    """A number that is seen first, and what it is."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with its title, and what it says. `legend` names colours: (CSS variable, words)."""

    title: str
    svg: Markup
    caption: str
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Cells of text below their heads; all but the first are numbers, or all but the first and the last. Folded away
    where `summary` is given."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    last_is_text: bool = False
    summary: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """A row of the corpus as it is shown: where it is, its score, other values, and its texts."""

    place: str
    score: str
    facts: Sequence[tuple[str, str]]
    prompt: str | None
    response: str | None


@dataclass(frozen=True, slots=True)
class Cards:
    """Rows below a title."""

    title: str
    cards: Sequence[Card]


@dataclass(frozen=True, slots=True)
class PageSection:
    """A section of the page with a name of its own (`anchor`)."""

    anchor: str
    title: str
    words: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    columns: Sequence[Cards] = ()


@dataclass(frozen=True, slots=True)
class ReportPage:
    """All that the page shows."""

    title: str
    source: str
    notes: Sequence[str]
    tiles: Sequence[Tile]
    sections: Sequence[PageSection] = field(default_factory=list)


def render(page: ReportPage) -> str:
    """The page as HTML."""
    folder = resources.files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    css = Markup((folder / "page.css").read_text(encoding="utf-8"))
    return template.render(page=page, css=css)


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
        if counts.turns is not None and counts.turns.count.any():
            yield f"  {wording.by_turn(counts.turns)}"
        if findings.pairs is not None and name in findings.pairs.counts:
            yield f"  accuracy {wording.accuracy(findings.pairs.counts[name])}"
    if findings.columns.pair is not None and findings.pairs is not None:
        pair = findings.columns.pair.name
        yield f"{pair}: accuracy {wording.accuracy(findings.pairs.counts[pair])}"
