"""Figures of pairs: their margins, how often they are right, and what the scores promised."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from jobs.intervals import interval
from jobs.reporting.figures import (
    ACCENT,
    HEIGHT,
    INK,
    QUIET,
    SECOND,
    WIDTH,
    figure_of_size,
    name_groups,
    points,
    whole_numbers,
)
from jobs.reporting.pairs import PairCounts
from jobs.reporting.stats import FINE_BINS, Axis, sums

MARGIN_BINS = (12, 20, 32, 48)
MAX_SIZE_GROUPS = 8
MIN_GROUP_PAIRS = 6


def margins(counts: PairCounts, axis: Axis) -> Figure:
    """A histogram of chosen minus rejected: what is left of zero is wrong."""
    with figure_of_size(WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        inside = counts.margins[1:-1]
        reach = _reach(np.maximum(inside[: FINE_BINS // 2][::-1], inside[FINE_BINS // 2 :]))
        wanted = 2 * math.sqrt(max(counts.num_pairs, 1))
        num_bins = min(MARGIN_BINS, key=lambda bins: abs(bins - wanted))
        step = max(1, math.ceil(2 * reach / num_bins))
        half = math.ceil(reach / step)
        width = (axis.high - axis.low) / axis.num_bins
        edges = np.arange(-half, half + 1) * step * width
        tops = _joined(inside, half, step)
        for part, colour in ((slice(0, half), SECOND), (slice(half, None), ACCENT)):
            own = edges[part.start : half + 1] if part.stop else edges[half:]
            axes.stairs(tops[part], own, fill=True, color=colour, alpha=0.75)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel("chosen minus rejected")
        axes.set_ylabel("pairs")
        whole_numbers(axes)
    return figure


def accuracy_by_margin(counts: PairCounts, axis: Axis) -> Figure:
    """Accuracy of the higher score by how much higher it is, beside what Bradley and Terry promise."""
    with figure_of_size(WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        size, pairs, right = _by_size(counts, axis)
        curve = np.linspace(0, size.max() * 1.05 or 1.0, 60)
        axes.plot(curve, 1 / (1 + np.exp(-curve)), color=QUIET, linewidth=1, linestyle="--")
        errors = _errors(right, pairs)
        points(axes, size, right / pairs, errors)
        axes.set_xlabel("margin, either way")
        axes.set_ylabel("accuracy")
        axes.set_ylim(_floor(right / pairs - errors[0]), 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y")
    return figure


def calibration(counts: PairCounts) -> Figure:
    """Accuracy of the higher score by the probability that the scores give it; below, how many pairs."""
    with figure_of_size(WIDTH, HEIGHT) as figure:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        there = counts.confidence > 0
        pairs = counts.confidence[there].astype(np.float64)
        axes.plot([0.5, 1], [0.5, 1], color=QUIET, linewidth=1, linestyle="--")
        right = counts.observed[there]
        errors = _errors(right, pairs)
        points(axes, counts.predicted[there] / pairs, right / pairs, errors)
        axes.set_ylabel("right")
        axes.set_ylim(_floor(right / pairs - errors[0]), 1.03)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y")
        edges = np.linspace(0.5, 1, len(counts.confidence) + 1)
        below.stairs(counts.confidence, edges, fill=True, color=QUIET, alpha=0.5)
        below.set_yticks([])
        below.set_ylabel("pairs")
        below.set_xlabel("predicted")
        below.set_xlim(0.5, 1)
        below.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def accuracy_by_group(names: Sequence[str], pairs: NDArray[np.float64], right: NDArray[np.float64]) -> Figure:
    """Groups below each other: accuracy with its 95 % interval, and the line of chance."""
    with figure_of_size(WIDTH, 0.7 + 0.28 * max(len(names), 2)) as figure:
        axes = figure.subplots()
        low, high = interval(right, pairs)
        places = np.arange(len(names))
        axes.axvline(0.5, color=QUIET, linewidth=1, linestyle="--")
        axes.hlines(places, low, high, color=QUIET, linewidth=1)
        axes.plot(right / pairs, places, "o", color=ACCENT, markersize=4.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel("accuracy")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        name_groups(axes, names)
    return figure


def _errors(right: NDArray[np.float64], pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = interval(right, pairs)
    share = right / pairs
    return np.maximum(np.stack([share - low, high - share]), 0.0)


def _floor(lowest: NDArray[np.float64]) -> float:
    """Where an axis of shares begins: below chance, and below all that is shown."""
    return max(0.0, math.floor(10 * min(0.5, float(lowest.min())) - 0.5) / 10)


def _reach(mirrored: NDArray[np.int64]) -> int:
    """Number of fine bins from zero that hold 99 % of the margins, at least."""
    below = np.cumsum(mirrored)
    return int(np.searchsorted(below, 0.99 * below[-1])) + 1 if below[-1] else len(mirrored)


def _joined(inside: NDArray[np.int64], half: int, step: int) -> NDArray[np.int64]:
    """`half` bins of `step` fine ones on either side of the middle; nothing is beyond the axis."""
    middle, reach = len(inside) // 2, half * step
    padded = np.pad(inside, max(0, reach - middle))
    middle = len(padded) // 2
    joined: NDArray[np.int64] = padded[middle - reach : middle + reach].reshape(2 * half, step).sum(-1)
    return joined


def _by_size(counts: PairCounts, axis: Axis) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Pairs in groups of about equal number by their absolute margin: its mean, how many, what is right."""
    fine = Axis(0.0, axis.high, axis.num_bins)
    middles = np.concatenate([[0.0], (fine.edges[:-1] + fine.edges[1:]) / 2, [fine.high]])
    num_groups = int(np.clip(counts.num_pairs // MIN_GROUP_PAIRS, 1, MAX_SIZE_GROUPS))
    before = np.cumsum(counts.sizes) - counts.sizes
    group = np.minimum(before * num_groups // max(counts.num_pairs, 1), num_groups - 1)
    pairs = sums(group, counts.sizes.astype(np.float64), num_groups)
    right = sums(group, counts.right_by_size, num_groups)
    size = sums(group, counts.sizes * middles, num_groups)
    there = pairs > 0
    return size[there] / pairs[there], pairs[there], right[there]
