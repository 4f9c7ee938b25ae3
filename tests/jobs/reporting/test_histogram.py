"""Counts over fixed bins against NumPy's, and what is read off them."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.reporting.stats import FINE_BINS, Axis, coarse, coarse_bins, histogram, quantile

SCORES = np.random.default_rng(3).normal(1, 2, 5000).astype(np.float32)


@pytest.mark.parametrize("is_log", [False, True])
def test_counts_are_those_of_numpy_with_what_is_off_the_axis_at_the_ends(is_log: bool) -> None:
    axis = Axis(0.5, 4.0, 12, is_log)
    values = np.concatenate([SCORES, np.array([0.5, 4.0, 4.0, -7, 9], np.float32)])
    found = histogram(axis, values)[0]
    assert found[1:-1].tolist() == np.histogram(values, axis.edges)[0].tolist()
    assert (found[0], found[-1]) == ((values < 0.5).sum(), (values > 4).sum())


def test_each_code_has_counts_of_its_own_and_rows_without_one_count_nowhere() -> None:
    axis = Axis(-8.0, 8.0)
    codes = np.random.default_rng(4).integers(-1, 3, len(SCORES))
    found = histogram(axis, SCORES, codes, num_codes=4)
    for code in range(4):
        assert (found[code] == histogram(axis, SCORES[codes == code])[0]).all()
    assert found.sum() == (codes >= 0).sum()


def test_fine_bins_join_into_coarse_ones() -> None:
    axis = Axis(-8.0, 10.0)
    found = coarse(histogram(axis, SCORES), 24)[0]
    assert found.tolist() == np.histogram(SCORES, axis.coarse_edges(24))[0].tolist()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.95, 1.0])
def test_quantiles_are_off_by_a_bin_at_most(share: float) -> None:
    axis = Axis(float(SCORES.min()), float(SCORES.max()))
    width = (axis.high - axis.low) / FINE_BINS
    assert abs(quantile(axis, histogram(axis, SCORES)[0], share) - np.quantile(SCORES, share)) <= 1.01 * width


def test_quantiles_of_nothing_and_of_what_is_off_the_axis() -> None:
    axis = Axis(0.0, 1.0)
    assert np.isnan(quantile(axis, histogram(axis, SCORES[:0])[0], 0.5))
    outside = histogram(axis, np.array([-5, -5, 7], np.float32))[0]
    assert (quantile(axis, outside, 0.5), quantile(axis, outside, 0.9)) == (0.0, 1.0)


def test_more_rows_are_shown_in_more_bins_and_one_value_in_few() -> None:
    axis = Axis(-8.0, 10.0)
    few, many = (coarse_bins(axis, histogram(axis, SCORES[:count])[0]) for count in (30, 5000))
    assert few < many
    assert all(FINE_BINS % bins == 0 for bins in (few, many))
    assert coarse_bins(axis, histogram(axis, np.full(9, 2.0))[0]) == 8
