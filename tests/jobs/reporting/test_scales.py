"""Scales of a corpus: axes, ranks, and which columns are fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from jobs.errors import CorpusError
from jobs.grouping.quantiles import ScoreSummary
from jobs.reporting.scales import LengthScale, MidRanks, ScoreScale, codes_of, settled, values_of
from jobs.reporting.stats import CoMoments
from tests.jobs.reporting.corpora import COLUMNS, scales_of, scored


def mid_ranks(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Ranks between 0 and 1, by comparing every value with every other."""
    below = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    ranks: NDArray[np.float64] = (below + equal / 2) / len(values)
    return ranks


def test_ranks_are_exact_where_no_summary_is_shortened() -> None:
    values = np.random.default_rng(1).integers(0, 40, 900).astype(np.float32)
    ranks = MidRanks.of([ScoreSummary.of(values[:500]), ScoreSummary.of(values[500:])])
    assert ranks(values) == pytest.approx(mid_ranks(values), abs=1e-12)


def test_spearman_of_a_large_corpus_is_off_by_a_thousandth_at_most() -> None:
    chooser = np.random.default_rng(2)
    x = chooser.integers(5, 3000, 60_000).astype(np.float32)
    y = (np.log(x) + chooser.normal(0, 2, len(x))).astype(np.float32)
    ranked = [MidRanks.of([ScoreSummary.of(part) for part in np.split(values, 4)])(values) for values in (x, y)]
    exact = [np.argsort(np.argsort(values)).astype(float) for values in (x, y)]  # ties are one in 3,000
    expected = np.corrcoef(exact[0], exact[1])[0, 1]
    assert CoMoments.of(*ranked).correlation == pytest.approx(expected, abs=1e-3)


def test_an_axis_has_all_scores_but_not_those_far_out() -> None:
    scores = np.random.default_rng(3).normal(0, 1, 5000).astype(np.float32)
    axis = ScoreScale.of([ScoreSummary.of(scores)]).axis
    assert (axis.low, axis.high) == (scores.min(), scores.max())
    far = ScoreScale.of([ScoreSummary.of(scores), ScoreSummary.of(np.array([9e6], np.float32))])
    assert far.axis.high < 20
    assert far.quantiles["1"] == 9e6


@pytest.mark.parametrize("scores", [[], [3.0], [3.0] * 50])
def test_one_score_or_none_has_an_axis_too(scores: list[float]) -> None:
    summary = ScoreSummary.of(np.array(scores, np.float32))
    scale = ScoreScale.of([summary])
    assert scale.axis.high - scale.axis.low == 1
    assert scale.margins(scale).high > 0
    lengths = LengthScale.of([summary], [summary])
    assert 1 <= lengths.axis.low < lengths.axis.high


def test_shares_of_the_lengths_have_about_as_many_rows() -> None:
    tokens = np.random.default_rng(4).lognormal(5, 1, 4000).astype(np.float32).round()
    lengths = LengthScale.of([ScoreSummary.of(tokens)], [ScoreSummary.of(tokens)])
    assert lengths.axis.is_log
    counts = np.bincount(np.searchsorted(lengths.share_edges, tokens, side="left"))
    assert len(counts) == 10
    assert counts.min() > 380
    assert counts.max() < 420


def test_columns_that_were_guessed_go_and_those_that_were_named_are_refused() -> None:
    rows = pa.table(
        {
            **{name: scored(300)[name] for name in ("score", "num_tokens", "error", "prompt")},
            "domain": [str(place) for place in range(300)],
            "preferred": ["good", "bad", None] * 100,
        }
    )
    scales = scales_of([rows.slice(0, 100), rows.slice(100)])
    kept, unfit = settled(replace(COLUMNS, guessed_by=True, guessed_label=True), scales)
    assert (kept.by, kept.label) == ((), None)
    assert "more than 200 values" in unfit[0]
    assert "has the values (none), bad, good; labels are booleans" in unfit[1]
    with pytest.raises(CorpusError, match="'domain' has more than 200 values; --by is for"):
        settled(replace(COLUMNS, guessed_label=True), scales)
    with pytest.raises(CorpusError, match="labels are booleans, 1 and 0"):
        settled(replace(COLUMNS, guessed_by=True), scales)


def test_values_that_are_not_utf8_have_one_name() -> None:
    texts = pa.array([b"a", b"caf\xe9", None, b"\xff"], pa.binary())
    column = pa.chunked_array([pa.Array.from_buffers(pa.string(), 4, texts.buffers())])
    values = sorted(values_of(column))
    assert values == ["(none)", "(not valid UTF-8)", "a"]
    assert codes_of(column, values).tolist() == [2, 1, 0, 1]
