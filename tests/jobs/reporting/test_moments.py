"""GroupMoments of parts, added, are those of the whole."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.reporting.stats import CoMoments, GroupMoments

CHOOSER = np.random.default_rng(5)
# Far from zero, where sums of squares would cancel.
VALUES = (CHOOSER.normal(0, 0.5, 3001) + 4096).astype(np.float32)
CODES = CHOOSER.integers(-1, 3, len(VALUES))
CUTS = ((0, 1000), (1000, 1000), (1000, 3001))


def test_moments_of_parts_are_those_of_the_whole_and_of_numpy() -> None:
    parts = [GroupMoments.of(VALUES[start:end], CODES[start:end], num_codes=4) for start, end in CUTS]
    found = parts[0] + parts[1] + parts[2]
    for code in range(3):
        own = VALUES[code == CODES].astype(np.float64)
        assert found.count[code] == len(own)
        assert found.mean[code] == pytest.approx(own.mean(), rel=1e-12)
        assert found.deviation[code] == pytest.approx(own.std(ddof=1), rel=1e-9)
    assert found.count[3] == 0
    assert np.isnan(found.deviation[3])


def test_correlations_of_parts_are_those_of_the_whole_and_of_numpy() -> None:
    x = CHOOSER.integers(1, 900, len(VALUES)).astype(np.float32)
    y = VALUES + x / 1000
    parts = [CoMoments.of(x[start:end], y[start:end]) for start, end in CUTS]
    found = parts[0] + parts[1] + parts[2]
    assert found.count == len(x)
    assert found.correlation == pytest.approx(np.corrcoef(x.astype(float), y.astype(float))[0, 1], rel=1e-9)
    assert found.slope == pytest.approx(np.polyfit(x.astype(float), y.astype(float), 1)[0], rel=1e-9)


def test_there_is_no_correlation_with_what_does_not_vary() -> None:
    ones, counts = np.ones(4, np.float32), np.arange(4, dtype=np.float32)
    assert CoMoments.of(ones, counts).correlation is None
    assert CoMoments.of(ones, counts).slope is None
    assert CoMoments.of(counts, ones).correlation is None
    assert (CoMoments() + CoMoments()).correlation is None
