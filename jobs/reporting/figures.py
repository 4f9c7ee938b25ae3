"""Figures of scores as SVG: how they are distributed, how they go with length, and how groups differ."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from jobs.reporting.counts import MAP_BINS, GroupCounts, LengthCounts
from jobs.reporting.scales import LengthScale, ScoreScale
from jobs.reporting.stats import Axis, GroupMoments, coarse, coarse_bins, quantile

# Matplotlib draws in these; the page has a colour of its own for each, by day and by night.
INK, QUIET, LINE, ACCENT, SECOND = "#010000", "#010001", "#010002", "#010003", "#010004"
_VARIABLES = {INK: "--ink", QUIET: "--quiet", LINE: "--line", ACCENT: "--accent", SECOND: "--second"}
_COLOURS = re.compile("|".join(_VARIABLES))
_FONTS = re.compile(r"font-family:[^;]*;?\s*")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")

# On top of Matplotlib's defaults, whatever the user's own style is.
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and has the reader's fonts
    "svg.hashsalt": "rayward",
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a column's name is a dollar
    "xtick.color": LINE,
    "xtick.labelcolor": QUIET,
    "xtick.labelsize": 10,
    "xtick.major.size": 3,
    "ytick.color": LINE,
    "ytick.labelcolor": QUIET,
    "ytick.labelsize": 10,
    "ytick.major.size": 3,
}


@contextmanager
def figure_of_size(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, and its style while it is drawn."""
    with matplotlib.style.context(["default", _STYLE]):
        yield Figure(figsize=(width, height), layout="constrained")


def inline(figure: Figure, *, name: str, title: str) -> Markup:
    """The figure as an element of a page.

    Args:
        figure: what `figure_of_size` made; it is drawn in that style.
        name: put in front of ids, so that figures of one page do not share any.
        title: what is read aloud.
    """
    target = io.BytesIO()
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # The browser draws the text and has fonts for it; Matplotlib only measures it.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # nothing that differs from run to run
        figure.savefig(target, format="svg", transparent=True, metadata=metadata)
    root = ET.fromstring(target.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # the style would hold for all of the page
                parent.remove(child)
    used = {found for element in root.iter() for value in element.attrib.values() for found in _references(value)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = dict(_attributes(element, name, used))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return Markup(ET.tostring(root, encoding="unicode"))


def printable(text: str, limit: int) -> str:
    """A label in one line of at most `limit` characters, without those that no SVG may hold."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "\u2026"


def _attributes(element: ET.Element, name: str, used: set[str]) -> Iterator[tuple[str, str]]:
    for key, value in element.attrib.items():
        if key == "id":
            if value in used:
                yield key, f"{name}-{value}"
        elif key.endswith("}href"):
            yield "href", f"#{name}-{value.removeprefix('#')}"
        else:
            value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
            if key == "style":
                value = _COLOURS.sub(lambda found: f"var({_VARIABLES[found[0]]})", _FONTS.sub("", value))
            yield key, value


def _references(value: str) -> list[str]:
    return [value[1:]] if value.startswith("#") else _REFERENCE.findall(value)


# In a page some 350 pixels wide, on a desktop three in a row: so letters are as large as the page's small ones.
WIDTH, HEIGHT = 4.2, 2.8
MAP_LEVELS = 6
MAX_LABEL_CHARS = 18
NORMAL_95 = 1.96


def distribution(counts: GroupCounts, sides: GroupCounts | None, scale: ScoreScale) -> Figure:
    """A histogram of scores with its median; where rows are labelled, one for each side."""
    with figure_of_size(WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        num_bins = coarse_bins(scale.axis, counts.histogram[0])
        edges = scale.axis.coarse_edges(num_bins)
        if sides is None:
            axes.stairs(coarse(counts.histogram[0], num_bins), edges, fill=True, color=ACCENT, alpha=0.75)
            axes.axvline(quantile(scale.axis, counts.histogram[0], 0.5), color=INK, linewidth=1)
        else:
            for side, colour in ((0, SECOND), (1, ACCENT)):
                tops = coarse(sides.histogram[side], num_bins)
                axes.stairs(tops, edges, fill=True, color=colour, alpha=0.25)
                axes.stairs(tops, edges, color=colour, linewidth=1.2, baseline=None)
        axes.set_xlabel("score")
        axes.set_ylabel("rows")
        axes.set_xlim(scale.axis.low, scale.axis.high)
        whole_numbers(axes)
    return figure


def length_map(counts: LengthCounts, lengths: LengthScale, scale: ScoreScale) -> Figure:
    """Rows by length and score: the darker the more."""
    with figure_of_size(WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        num_rows = next(bins for bins in (12, 16, 24, MAP_BINS) if bins >= lengths.axis.num_bins or bins == MAP_BINS)
        cells = counts.map.reshape(counts.map.shape[0], num_rows, -1).sum(-1)
        levels = np.ceil(MAP_LEVELS * np.sqrt(cells / max(cells.max(), 1))).astype(int)
        x, y = lengths.axis.edges, scale.axis.coarse_edges(num_rows)
        for level in range(1, MAP_LEVELS + 1):
            if (levels == level).any():
                axes.add_patch(
                    PathPatch(
                        _rectangles(levels == level, x, y), facecolor=ACCENT, alpha=level / MAP_LEVELS, linewidth=0
                    )
                )
        axes.set_ylim(scale.axis.low, scale.axis.high)
        axes.set_xlabel("tokens")
        axes.set_ylabel("score")
        length_axis(axes, lengths.axis)
    return figure


def mean_by_length(counts: LengthCounts, lengths: LengthScale) -> Figure:
    """The mean score of each share of the lengths, with its 95 % interval."""
    with figure_of_size(WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        there = counts.shares.count > 0
        error = NORMAL_95 * counts.shares.deviation[there] / np.sqrt(counts.shares.count[there])
        points(axes, counts.lengths.mean[there], counts.shares.mean[there], np.nan_to_num(error), joined=True)
        axes.set_xlabel("tokens")
        axes.set_ylabel("mean score")
        axes.grid(axis="y")
        length_axis(axes, lengths.axis)
    return figure


def mean_by_turn(turns: GroupMoments) -> Figure:
    """The mean score after each answer, the first at 1, with its 95 % interval."""
    with figure_of_size(WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        there = np.flatnonzero(turns.count)
        error = NORMAL_95 * turns.deviation[there] / np.sqrt(turns.count[there])
        points(axes, (there + 1).astype(np.float64), turns.mean[there], np.nan_to_num(error), joined=True)
        axes.set_xlabel("answer")
        axes.set_ylabel("mean score")
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return figure


@dataclass(frozen=True, slots=True)
class GroupLine:
    """A group of rows as it is drawn: its name, and the quantiles of its scores (5, 25, 50, 75 and 95 %)."""

    name: str
    quantiles: tuple[float, float, float, float, float]


def group_lines(groups: Sequence[GroupLine], axis: Axis) -> Figure:
    """Groups below each other: a dot at the median, a bar for the middle half, a line for the middle 90 %."""
    with figure_of_size(WIDTH, 0.7 + 0.28 * max(len(groups), 2)) as figure:
        axes = figure.subplots()
        places = np.arange(len(groups))
        low, first, middle, third, high = np.array([group.quantiles for group in groups]).T
        axes.hlines(places, low, high, color=QUIET, linewidth=1)
        axes.hlines(places, first, third, color=ACCENT, linewidth=6, alpha=0.55)
        axes.plot(middle, places, "o", color=INK, markersize=4)
        axes.set_xlabel("score")
        axes.set_xlim(min(axis.low, *low), max(axis.high, *high))
        name_groups(axes, [group.name for group in groups])
    return figure


def name_groups(axes: Axes, names: Sequence[str]) -> None:
    """The groups' names along the y axis, the first on top."""
    axes.set_yticks(range(len(names)), [printable(name, MAX_LABEL_CHARS) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def points(
    axes: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    error: NDArray[np.float64],
    *,
    joined: bool = False,
) -> None:
    """Points with intervals: `error` is one length for both directions, or the two of them [2, points]."""
    axes.errorbar(
        x,
        y,
        yerr=error,
        fmt="o-" if joined else "o",
        color=ACCENT,
        markersize=4,
        linewidth=1.2,
        elinewidth=1,
        ecolor=QUIET,
    )


def whole_numbers(axes: Axes) -> None:
    """Counts along the y axis, as whole numbers with commas."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def length_axis(axes: Axes, axis: Axis) -> None:
    """Token counts along the x axis; on a logarithmic one at most six numbers, of 1, 2 and 5."""
    axes.set_xlim(axis.low, axis.high)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if axis.is_log:
        axes.set_xscale("log")
        steps = [step * 10**power for power in range(8) for step in (1, 2, 5)]
        ticks = [step for step in steps if axis.low <= step <= axis.high]
        axes.xaxis.set_major_locator(FixedLocator(ticks[:: 1 + len(ticks) // 7]))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _rectangles(chosen: NDArray[np.bool_], x: NDArray[np.float64], y: NDArray[np.float64]) -> Path:
    """One path around the chosen cells [columns, rows]: thousands of elements would make the page heavy."""
    columns, rows = np.nonzero(chosen)
    left, right, bottom, top = x[columns], x[columns + 1], y[rows], y[rows + 1]
    corners = [(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)]
    vertices = np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1).reshape(-1, 2)
    codes = np.tile([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY], len(columns))
    return Path(vertices, codes)
