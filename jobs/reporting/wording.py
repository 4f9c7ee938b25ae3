"""Figures in words: numbers as they are read, and what they mean."""

from __future__ import annotations

import math

import numpy as np

from jobs.intervals import interval
from jobs.reporting.counts import LengthCounts
from jobs.reporting.pairs import PairCounts
from jobs.reporting.stats import GroupMoments

MIN_ROWS_OF_TREND = 10
TOLD_TURNS = 6
# Cohen (1988) calls correlations from these on small, medium and large.
HARDLY = "hardly any"
STRENGTHS = ((0.1, HARDLY), (0.3, "weak"), (0.5, "moderate"), (math.inf, "strong"))


def score(value: float | None) -> str:
    """A score with four digits; a dash where there is none."""
    return "\u2013" if value is None or math.isnan(value) else f"{value:,.4g}".replace("-", "\u2212")


def count(number: int, what: str) -> str:
    """A number of things, such as "1 row" or "2,000 rows"."""
    return f"{number:,} {what if number == 1 else what + 's'}"


def by_turn(turns: GroupMoments) -> str:
    """The mean score after each of the first answers, with the number of conversations that it is of."""
    there = np.flatnonzero(turns.count)
    told = [f"{score(float(turns.mean[turn]))} ({int(turns.count[turn]):,})" for turn in there[:TOLD_TURNS].tolist()]
    more = f", and of {count(len(there) - TOLD_TURNS, 'later answer')}" if len(there) > TOLD_TURNS else ""
    return f"mean after each answer (conversations): {', '.join(told)}{more}"


def percent(share: float) -> str:
    return "\u2013" if math.isnan(share) else f"{100 * share:.1f}\u00a0%"


def correlation(value: float) -> str:
    """A correlation with two digits behind the point."""
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "\u2212")


def strength(value: float) -> str:
    """The word for the strength of a correlation."""
    return next(word for limit, word in STRENGTHS if abs(value) < limit)


def accuracy(pairs: PairCounts) -> str:
    """The accuracy with its 95 % interval."""
    if not pairs.num_pairs:
        return "no pairs with two scores"
    low, high = interval(pairs.right, pairs.num_pairs)
    reach = f"95\u00a0% interval {100 * float(low):.1f} to {percent(float(high))}"
    return f"{percent(pairs.accuracy)} of {count(pairs.num_pairs, 'pair')} ({reach})"


def length_bias(lengths: LengthCounts) -> str:
    """Whether longer conversations score higher, in a sentence or two."""
    ranked, linear = lengths.ranked.correlation, lengths.linear.correlation
    if lengths.ranked.count < MIN_ROWS_OF_TREND:
        return f"{count(lengths.ranked.count, 'row')} with a score and a length: too few for a trend."
    if ranked is None or linear is None:
        return "Scores or lengths are all the same: there is no trend."
    figures = f"Spearman {correlation(ranked)}, Pearson {correlation(linear)}"
    if strength(ranked) == HARDLY:
        return f"Scores hardly go with length ({figures})."
    direction = "higher" if ranked > 0 else "lower"
    sentence = f"Longer conversations score {direction}: a {strength(ranked)} correlation ({figures})."
    slope = lengths.doubling.slope or 0.0
    change = "more" if slope > 0 else "less"
    return f"{sentence} Twice the tokens go with {score(abs(round(slope, 4)))} {change} on average."


def longer_response(pairs: PairCounts) -> str | None:
    """Length and preference in words, by people and by the model; None where it is not known."""
    (shorter, _, longer), (right_shorter, _, right_longer) = pairs.longer
    if not shorter or not longer:
        return None
    differing = shorter + longer
    picked = (shorter - right_shorter) + right_longer
    return (
        f"Where the lengths of two responses differ, the longer one is preferred in {percent(longer / differing)} of "
        f"the pairs, and scores higher in {percent(picked / differing)}. Accuracy is "
        f"{percent(right_longer / longer)} where the preferred response is the longer one, and "
        f"{percent(right_shorter / shorter)} where it is the shorter one."
    )
