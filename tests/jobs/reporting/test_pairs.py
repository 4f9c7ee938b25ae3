"""PairsByColumn of labelled rows against plain loops over the prompts."""

from __future__ import annotations

import math
from functools import reduce
from itertools import product
from operator import add
from typing import Any

import numpy as np
import pytest

from jobs.intervals import interval
from jobs.reporting.pairs import (
    CONFIDENCE_BINS,
    MAX_SIDE,
    LabelledRows,
    PairCounts,
    PairsByColumn,
    joined,
    paired_rows,
    pairs_of_prompts,
    split,
)
from tests.jobs.reporting.corpora import COLUMNS, scales_of, scored

TABLE = scored(600, seed=8, num_prompts=150)


def plain_pairs() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every pair of the table, whether it has scores or not."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in TABLE.to_pylist():
        if row["preferred"] is not None:
            by_prompt.setdefault(row["prompt"], []).append(row)
    sides = [
        ([r for r in rows if r["preferred"]], [r for r in rows if not r["preferred"]]) for rows in by_prompt.values()
    ]
    return [pair for chosen, rejected in sides for pair in product(chosen, rejected)]


@pytest.fixture(scope="module")
def pairs() -> PairsByColumn:
    """The pairs of the table, read in three stretches and regrouped in four shares."""
    stretches = [TABLE.slice(0, 100), TABLE.slice(100, 400), TABLE.slice(500)]
    scales = scales_of(stretches)
    pieces = [split(LabelledRows.of(table, COLUMNS, scales), 4) for table in stretches]
    shares = [joined([own[share] for own in pieces]) for share in range(4)]
    return reduce(add, [pairs_of_prompts(rows, COLUMNS, scales) for rows in shares])


def scored_pairs() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [pair for pair in plain_pairs() if all(row["score"] is not None for row in pair)]


def test_pairs_meet_across_stretches(pairs: PairsByColumn) -> None:
    found, expected = pairs.counts["score"], scored_pairs()
    assert found.num_pairs == len(expected) > 400
    assert found.right == sum(chosen["score"] > rejected["score"] for chosen, rejected in expected)
    assert found.margins.sum() == found.sizes.sum() == found.confidence.sum() == len(expected)
    assert found.margins[len(found.margins) // 2 :].sum() == found.right  # above zero
    assert pairs.prompts == len({chosen["prompt"] for chosen, _ in plain_pairs()})
    partnered = {row["response"] for pair in plain_pairs() for row in pair}
    assert pairs.alone == sum(row["preferred"] is not None for row in TABLE.to_pylist()) - len(partnered)
    assert pairs.cut == 0


def test_calibration_is_that_of_a_plain_computation(pairs: PairsByColumn) -> None:
    found = pairs.counts["score"]
    margins = [chosen["score"] - rejected["score"] for chosen, rejected in scored_pairs()]
    bins: dict[int, list[tuple[float, bool]]] = {}
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        place = min(int((confidence - 0.5) / 0.5 * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)
        bins.setdefault(place, []).append((confidence, margin > 0))
    errors = [abs(sum(p for p, _ in own) - sum(right for _, right in own)) for own in bins.values()]
    assert found.calibration_error == pytest.approx(sum(errors) / len(margins), rel=1e-9)
    log_loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    assert found.mean_log_loss == pytest.approx(log_loss, rel=1e-9)


def test_accuracy_is_told_by_group_and_by_which_response_is_longer(pairs: PairsByColumn) -> None:
    found = pairs.counts["score"]
    for place, value in enumerate(scales_of([TABLE]).values["domain"] or ()):
        own = [pair for pair in scored_pairs() if (pair[0]["domain"] or "(none)") == value]
        right = sum(chosen["score"] > rejected["score"] for chosen, rejected in own)
        assert found.by["domain"][:, place].tolist() == [len(own), right]
    known = [pair for pair in scored_pairs() if all(row["num_tokens"] is not None for row in pair)]
    for place, sign in enumerate((-1, 0, 1)):
        own = [(c, r) for c, r in known if np.sign(c["num_tokens"] - r["num_tokens"]) == sign]
        assert found.longer[:, place].tolist() == [len(own), sum(c["score"] > r["score"] for c, r in own)]


def test_equal_scores_are_half_right() -> None:
    ones = np.ones(4, np.float32)
    scales = scales_of([TABLE])
    axis = scales.scores["score"].margins(scales.scores["score"])
    found = PairCounts.of(ones, ones, axis, codes={})
    assert (found.accuracy, found.ties, found.num_pairs) == (0.5, 4, 4)
    assert found.calibration_error == 0
    assert found.mean_log_loss == pytest.approx(math.log(2))
    nothing = PairCounts.of(ones[:0], ones[:0], axis, codes={})
    assert math.isnan(nothing.accuracy)
    assert (nothing + found).accuracy == 0.5


def test_a_large_prompt_is_cut_and_rows_without_a_prompt_have_no_pair() -> None:
    keys = np.array([[1, 1]] * 40 + [[0, 0]] * 4 + [[2, 2]], np.uint64)
    side = np.array([1, 0] * 20 + [1, 0, 1, 0] + [1], np.int8)
    found = paired_rows(keys, side)
    assert len(found.chosen) == MAX_SIDE**2
    assert (found.prompts, found.alone, found.cut) == (1, 5, 1)
    assert sorted(set(found.chosen.tolist())) == list(range(0, 32, 2))
    assert sorted(set(found.rejected.tolist())) == list(range(1, 32, 2))
    empty = paired_rows(keys[:0], side[:0])
    assert (len(empty.chosen), empty.prompts, empty.alone) == (0, 0, 0)


def test_the_interval_is_wilsons() -> None:
    low, high = interval(8, 10)  # 49.0 % to 94.3 %: the example of Brown, Cai and DasGupta (2001) for n = 10
    assert (round(float(low), 3), round(float(high), 3)) == (0.49, 0.943)
    assert interval(0, 5)[0] == 0
