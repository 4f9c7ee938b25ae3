"""Quantiles from summaries: exact for few scores, within their bound for many."""

from __future__ import annotations

import numpy as np

from jobs.grouping.quantiles import QUANTILES, ScoreSummary, quantiles


def test_quantiles_of_few_scores_are_exact() -> None:
    scores = np.random.default_rng(1).normal(size=1001).astype(np.float32)
    found = quantiles([ScoreSummary.of(scores[:400]), ScoreSummary.of(scores[400:])])
    ordered = np.sort(scores)
    assert found["0.5"] == ordered[500]
    assert (found["0"], found["1"]) == (ordered[0], ordered[-1])


def test_quantiles_of_many_scores_are_off_by_a_twentieth_of_a_percent_of_the_rows() -> None:
    chooser = np.random.default_rng(2)
    parts = [chooser.normal(mean, 1, 50_000).astype(np.float32) for mean in (-3, 0, 0.5, 4)]
    found = quantiles([ScoreSummary.of(part) for part in parts])
    ordered = np.sort(np.concatenate(parts))
    for share in QUANTILES:
        place = np.searchsorted(ordered, found[f"{share:g}"], side="left")
        assert abs(place - share * len(ordered)) <= 0.0005 * len(ordered)
    assert (found["0"], found["1"]) == (ordered[0], ordered[-1])


def test_scores_that_are_missing_do_not_count() -> None:
    scores = np.array([np.nan, 1, np.nan, 3, 2], np.float32)
    assert quantiles([ScoreSummary.of(scores)])["0.5"] == 2.0
    assert quantiles([ScoreSummary.of(scores[:1])]) == {}
    assert quantiles([]) == {}
