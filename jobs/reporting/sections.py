"""Findings in a corpus as sections of a page; a section is there where the corpus has what it is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from jobs.reporting import wording
from jobs.reporting.counts import MAX_TURNS, GroupCounts, LengthCounts, ScoreCounts
from jobs.reporting.extremes import ShownRow
from jobs.reporting.figures import (
    GroupLine,
    distribution,
    group_lines,
    inline,
    length_map,
    mean_by_length,
    mean_by_turn,
)
from jobs.reporting.page import Card, Cards, Figure, PageSection, ReportPage, Table, Tile
from jobs.reporting.pair_figures import accuracy_by_group, accuracy_by_margin, calibration, margins
from jobs.reporting.pairs import MAX_SIDE, PairCounts
from jobs.reporting.provenance import Provenance, ScoringRecord
from jobs.reporting.scales import LengthScale, ScoreScale
from jobs.reporting.stage import Findings
from jobs.reporting.stats import Axis, GroupMoments, quantile
from serve_app.reward_model.tiny import note as embedded_note

MAX_DRAWN = 24
GROUP_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


def group_sections(findings: Findings, name: str, *, anchor: str, prefix: str) -> Iterator[PageSection]:
    """For each column of groups one that compares the scores in the column `name`."""
    for place, column in enumerate(findings.columns.by):
        if len(findings.scales.values[column] or ()) > 1:
            yield _section(findings, name, column, anchor=f"{anchor}-by{place}", prefix=prefix)


def pair_sections(findings: Findings, name: str) -> Iterator[PageSection]:
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
            yield PageSection(
                anchor,
                f"Pairs by {column}",
                figures=[_accuracies(values, drawn, pairs, column=column, anchor=anchor)],
                tables=[Table([column, "pairs", "accuracy"], rows, summary=summary)],
            )


def _section(findings: Findings, name: str, column: str, *, anchor: str, prefix: str) -> PageSection:
    counts, values = findings.counts[name].by[column], findings.scales.values[column] or ()
    axis = findings.scales.scores[name].axis
    lines = [
        GroupLine(value, tuple(quantile(axis, own, share) for share in GROUP_SHARES))  # type: ignore[arg-type]
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
    return PageSection(anchor, f"{prefix}By {column}", figures=figures, tables=[table])


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


SHARES = {
    "lowest": "0",
    "5 %": "0.05",
    "25 %": "0.25",
    "median": "0.5",
    "75 %": "0.75",
    "95 %": "0.95",
    "highest": "1",
}
CHANCE = "of Bradley and Terry (1952), sigmoid of the margin"


def page_of(findings: Findings, *, title: str, source: str, provenance: Provenance) -> ReportPage:
    """The page that tells what was found.

    Args:
        findings: of the corpus.
        title: of the page.
        source: what was read, in a line.
        provenance: how the scores were made.
    """
    sections: list[PageSection] = []
    several = len(findings.columns.scores) > 1
    if findings.columns.pair is not None:
        pair = findings.columns.pair
        chosen, rejected = (findings.scales.scores[side.name] for side in (pair.chosen, pair.rejected))
        sections.append(_pairs(findings, pair.name, chosen.margins(rejected), anchor="pairs", prefix=""))
        sections += pair_sections(findings, pair.name)
    for number, column in enumerate(findings.columns.scores):
        prefix = f"{column.name} \u00b7 " if several else ""
        sections += _score_sections(findings, column.name, anchor=f"s{number}", prefix=prefix)
    records = provenance.records
    sections += [_record(record, several=len(records) > 1) for record in records]
    numbered = [replace(section, anchor=f"{section.anchor}-{number}") for number, section in enumerate(sections)]
    return ReportPage(title, source, list(_notes(findings, provenance)), list(_tiles(findings)), numbered)


def _score_sections(findings: Findings, name: str, *, anchor: str, prefix: str) -> Iterator[PageSection]:
    counts, scale = findings.counts[name], findings.scales.scores[name]
    if counts.scores.moments.count[0]:
        yield _scores(findings, name, anchor=anchor, prefix=prefix)
        if counts.turns is not None and np.count_nonzero(counts.turns.count) > 1:
            yield _turns(counts.turns, anchor=anchor, prefix=prefix)
        columns, pairs = findings.columns, findings.pairs
        # Labels that nobody named may be there without a counterpart, as in the best of each prompt.
        if columns.label is not None and pairs and (pairs.counts[name].num_pairs or not columns.guessed_label):
            yield _pairs(findings, name, scale.margins(scale), anchor=anchor, prefix=prefix)
        yield from group_sections(findings, name, anchor=anchor, prefix=prefix)
        if findings.best[name]:
            cards = [
                Cards("Highest scores", _cards(findings.best[name])),
                Cards("Lowest scores", _cards(findings.worst[name])),
            ]
            words = ["Rows are counted from 0 in their file."]
            yield PageSection(f"{anchor}-rows", f"{prefix}Best and worst rows", words, columns=cards)
    if counts.errors.kinds:
        yield _errors(counts, findings.scales.num_rows, anchor=anchor, prefix=prefix)


def _scores(findings: Findings, name: str, *, anchor: str, prefix: str) -> PageSection:
    """The distribution, and how scores go with length where lengths are known."""
    counts, scale = findings.counts[name], findings.scales.scores[name]
    words, figures = [], [_distribution(findings, counts, scale, anchor=anchor)]
    tokens = next(column.tokens for column in findings.columns.scores if column.name == name)
    if tokens is not None and counts.lengths is not None and counts.lengths.ranked.count:
        words.append(wording.length_bias(counts.lengths))
        figures += _length(counts.lengths, findings.scales.lengths[name], scale, tokens=tokens, anchor=anchor)
    return PageSection(f"{anchor}-scores", f"{prefix}Scores", words, figures, [_moments(name, counts.scores, scale)])


def _turns(turns: GroupMoments, *, anchor: str, prefix: str) -> PageSection:
    """The scores after each answer, by its number."""
    there = np.flatnonzero(turns.count).tolist()
    rows = [
        [
            f"{turn + 1} and later" if turn == MAX_TURNS - 1 else str(turn + 1),
            f"{turns.count[turn]:,}",
            wording.score(float(turns.mean[turn])),
            wording.score(float(turns.deviation[turn])),
        ]
        for turn in there
    ]
    figure = Figure(
        "Mean score by answer",
        inline(mean_by_turn(turns), name=f"{anchor}-turns", title="Mean score by answer"),
        "Of the conversation up to each answer, with 95\u00a0% intervals. Later answers are of longer conversations "
        "alone.",
    )
    table = Table(["answer", "conversations", "mean", "sd"], rows)
    return PageSection(f"{anchor}-turns", f"{prefix}Scores after each answer", figures=[figure], tables=[table])


def _distribution(findings: Findings, counts: ScoreCounts, scale: ScoreScale, *, anchor: str) -> Figure:
    outside = int(counts.scores.histogram[0, [0, -1]].sum())
    beyond = f" {wording.count(outside, 'row')} beyond the axis." if outside else ""
    sides = counts.sides if counts.sides is not None and counts.sides.moments.count.all() else None
    label = findings.columns.label.name if findings.columns.label else ""
    return Figure(
        "Distribution",
        inline(distribution(counts.scores, sides, scale), name=anchor, title="Distribution"),
        ("Rows by score." if sides else "Rows by score; the line is the median.") + beyond,
        (("--accent", f"chosen ({label})"), ("--second", "rejected")) if sides else (),
    )


def _moments(name: str, counts: GroupCounts, scale: ScoreScale) -> Table:
    row = [
        name,
        f"{int(counts.moments.count[0]):,}",
        wording.score(float(counts.moments.mean[0])),
        wording.score(float(counts.moments.deviation[0])),
        *(wording.score(scale.quantiles[share]) for share in SHARES.values()),
    ]
    return Table(["", "rows", "mean", "sd", *SHARES], [row])


def _length(
    counts: LengthCounts, lengths: LengthScale, scale: ScoreScale, *, tokens: str, anchor: str
) -> Iterator[Figure]:
    yield Figure(
        "Scores and lengths",
        inline(length_map(counts, lengths, scale), name=f"{anchor}-map", title="Rows by length and score"),
        f"The stronger the colour, the more rows. Length is {tokens}: prompt and response together.",
    )
    if len(lengths.share_edges):
        yield Figure(
            "Mean score by length",
            inline(mean_by_length(counts, lengths), name=f"{anchor}-mean", title="Mean score by length"),
            f"{len(lengths.share_edges) + 1} groups of about as many rows each, with 95\u00a0% intervals.",
        )


def _pairs(findings: Findings, name: str, axis: Axis, *, anchor: str, prefix: str) -> PageSection:
    assert findings.pairs is not None
    pairs = findings.pairs.counts[name]
    if not pairs.num_pairs:
        return PageSection(
            f"{anchor}-pairs", f"{prefix}Pairs", ["There are no pairs in which both responses have a score."]
        )
    figures = [
        Figure(
            "Margins",
            inline(margins(pairs, axis), name=f"{anchor}-margins", title="Margins"),
            "Score of the chosen response minus score of the rejected one; what is left of zero is wrong.",
        ),
        Figure(
            "Accuracy by margin",
            inline(accuracy_by_margin(pairs, axis), name=f"{anchor}-accuracy", title="Accuracy by margin"),
            f"Groups of about as many pairs each, with 95\u00a0% intervals. Dashed: the probability {CHANCE}.",
        ),
        Figure(
            "Calibration",
            inline(calibration(pairs), name=f"{anchor}-calibration", title="Calibration"),
            "How often the higher score is right, by the probability that the scores give it. On the dashed line "
            "the two are the same; below it the scores promise too much.",
        ),
    ]
    return PageSection(f"{anchor}-pairs", f"{prefix}Pairs", list(_pair_words(findings, pairs)), figures)


def _pair_words(findings: Findings, pairs: PairCounts) -> Iterator[str]:
    assert findings.pairs is not None
    column = findings.columns.label
    if column is not None:
        how = f"column {column.name}, candidates of one {column.keys.column or 'prompt'}"
        made = f"{wording.count(findings.pairs.prompts, 'prompt')} with chosen and rejected responses ({how})"
    else:
        made = "every row is a pair"
    ties = f"; {wording.count(pairs.ties, 'tie')}, which count half" if pairs.ties else ""
    yield f"Accuracy {wording.accuracy(pairs)}{ties}; {made}."
    yield (
        f"Probabilities {CHANCE}: expected calibration error {wording.percent(pairs.calibration_error)}, mean log loss "
        f"{pairs.mean_log_loss:.3f} (0.693 is that of no scores at all)."
    )
    if longer := wording.longer_response(pairs):
        yield longer
    if findings.pairs.alone:
        yield f"{wording.count(findings.pairs.alone, 'labelled row')} without a counterpart of the same prompt."
    if findings.pairs.cut:
        yield (
            f"{wording.count(findings.pairs.cut, 'prompt')} with more than {MAX_SIDE} chosen or rejected responses: "
            f"the first {MAX_SIDE} of each are paired."
        )


def _cards(rows: Sequence[ShownRow]) -> list[Card]:
    return [
        Card(f"{row.file}, row {row.row:,}", wording.score(row.score), row.facts, row.prompt, row.response)
        for row in rows
    ]


def _errors(counts: ScoreCounts, num_rows: int, *, anchor: str, prefix: str) -> PageSection:
    total = counts.errors.total
    ordered = sorted(counts.errors.kinds.items(), key=lambda item: (-item[1].count, item[0]))
    rows = [
        [kind, f"{found.count:,}", wording.percent(found.count / num_rows), found.example] for kind, found in ordered
    ]
    words = f"{wording.count(total, 'row')} of {num_rows:,} without a score ({wording.percent(total / num_rows)})."
    table = Table(["kind", "rows", "of all", "for example"], rows, last_is_text=True)
    return PageSection(f"{anchor}-errors", f"{prefix}Rows without a score", [words], tables=[table])


def _record(record: ScoringRecord, *, several: bool) -> PageSection:
    rows = [
        ("model", record.model),
        ("revision", record.revision),
        ("fingerprint of its files", record.fingerprint),
        ("device, dtype", ", ".join(filter(None, (record.device, record.dtype)))),
        ("processor", "; ".join(record.processors)),
        ("status", record.status if record.status != "complete" else None),
        ("rows, tokens", f"{record.rows:,}, {record.tokens:,}" if record.rows else None),
        ("without a score", f"{record.errors:,}" if record.errors else None),
        ("scoring", f"{record.seconds:,.1f} s, summed over actors" if record.seconds else None),
        ("throughput of an actor", f"{record.tokens_per_s:,.0f} tokens/s" if record.tokens_per_s else None),
        ("last run, with start-up", f"{record.elapsed_s:,.1f} s" if record.elapsed_s else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
    ]
    name = f"{record.prefix}score: " if several else ""
    table = Table(["", ""], [(key, value) for key, value in rows if value], last_is_text=True)
    return PageSection("throughput", f"{name}How it was scored", tables=[table])


def _notes(findings: Findings, provenance: Provenance) -> Iterator[str]:
    yield from dict.fromkeys(line for record in provenance.records if (line := embedded_note(record.model)))
    if provenance.is_selected and findings.columns.pair is not None:
        yield "jobs.pairs chose these pairs by their scores: every one is right, which says nothing of the model."
    if not findings.scales.num_rows:
        yield "The corpus has no rows."
    elif not any(counts.scores.moments.count[0] for counts in findings.counts.values()):
        yield "No row has a score."
    yield from (f"Left out: {reason}." for reason in findings.left_out)


def _tiles(findings: Findings) -> Iterator[Tile]:
    num_rows = findings.scales.num_rows
    yield Tile("rows", f"{num_rows:,}")
    several = len(findings.columns.scores) > 1
    for name, counts in findings.counts.items():
        scored = int(counts.scores.moments.count[0])
        if scored < num_rows:
            yield Tile(f"without {name if several else 'a score'}", f"{num_rows - scored:,}")
        if scored:
            scale = findings.scales.scores[name]
            low, high = (wording.score(scale.quantiles[share]) for share in ("0.05", "0.95"))
            yield Tile(f"median {name}", wording.score(scale.quantiles["0.5"]), f"90\u00a0% from {low} to {high}")
    for name, pairs in (findings.pairs.counts if findings.pairs else {}).items():
        if pairs.num_pairs:
            note = f"of {wording.count(pairs.num_pairs, 'pair')}"
            yield Tile(f"accuracy of {name}" if several else "accuracy", wording.percent(pairs.accuracy), note)
    for name, counts in findings.counts.items():
        lengths = counts.lengths
        if lengths and lengths.ranked.correlation is not None and lengths.ranked.count >= wording.MIN_ROWS_OF_TREND:
            title = f"length and {name}" if several else "length and score"
            strength = wording.strength(lengths.ranked.correlation)
            yield Tile(title, wording.correlation(lengths.ranked.correlation), f"Spearman: {strength}")
