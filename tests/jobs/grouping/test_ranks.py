"""Vectorised ranks and pairs against loops that say the same in plain Python."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pytest
from numpy.typing import NDArray

from jobs.grouping.pairs import Strategy, select_pairs
from jobs.grouping.ranks import best_rows, rank_groups
from serve_app.reward_model.scores import ranks

NUM_GROUPS = 200


@pytest.fixture(scope="module")
def rows() -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Keys and scores of 3,000 rows: equal scores are common, a tenth is NaN, some rows have no group."""
    chooser = np.random.default_rng(7)
    group = chooser.integers(0, NUM_GROUPS, 3000)
    # Keys of different groups share one of their halves.
    keys = np.stack([1 + group // 2, 1 + group % 2], axis=1).astype(np.uint64)
    keys[chooser.random(3000) < 0.02] = 0
    scores = chooser.integers(-4, 4, 3000).astype(np.float32) / 4
    scores[chooser.random(3000) < 0.1] = np.nan
    return keys, scores.astype(np.float32)


def members(keys: NDArray[np.uint64]) -> dict[tuple[int, int], list[int]]:
    """The rows of each group, in order."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, (high, low) in enumerate(keys.tolist()):
        if high or low:
            found[high, low].append(row)
    return found


def test_ranks_sizes_and_margins_are_those_of_a_loop(rows: tuple[NDArray[np.uint64], NDArray[np.float32]]) -> None:
    keys, scores = rows
    found = rank_groups(keys, scores)
    rank, size, margin = [-1] * len(scores), [-1] * len(scores), [float("nan")] * len(scores)
    for group in members(keys).values():
        scored = [row for row in group if not np.isnan(scores[row])]
        for row in group:
            size[row] = len(group)
        for row, place in zip(scored, ranks([float(scores[row]) for row in scored]), strict=True):
            rank[row], margin[row] = place, max(scores[scored]) - scores[row]
    assert found.rank.tolist() == rank
    assert found.group_size.tolist() == size
    np.testing.assert_array_equal(found.margin, np.array(margin, np.float32))


def test_no_rows_have_no_ranks() -> None:
    found = rank_groups(np.empty((0, 2), np.uint64), np.empty(0, np.float32))
    assert len(found.rank) == len(found.group_size) == len(found.margin) == 0


@pytest.mark.parametrize("k", [1, 7, 500, 2699, 5000])
def test_the_best_rows_are_the_first_of_a_stable_order(
    rows: tuple[NDArray[np.uint64], NDArray[np.float32]], k: int
) -> None:
    scores = rows[1]
    order = [row for row in np.argsort(-scores, kind="stable").tolist() if not np.isnan(scores[row])]
    assert best_rows(scores, k).tolist() == sorted(order[:k])


@pytest.mark.parametrize("min_margin", [0.0, 0.6])
@pytest.mark.parametrize("max_pairs", [1, 5, 64])
@pytest.mark.parametrize("strategy", ["best-worst", "best-random", "all"])
def test_pairs_are_those_of_a_loop(
    rows: tuple[NDArray[np.uint64], NDArray[np.float32]], strategy: Strategy, max_pairs: int, min_margin: float
) -> None:
    keys, scores = rows
    found = select_pairs(keys, scores, strategy=strategy, min_margin=min_margin, max_pairs=max_pairs, seed=3)
    pairs = list(zip(found.chosen.tolist(), found.rejected.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    group_of = [tuple(key) for key in keys.tolist()]
    ours = {key: list(own) for key, own in itertools.groupby(pairs, key=lambda pair: group_of[pair[0]])}
    assert len(ours) == found.num_paired
    wanted_groups = 0
    for key, group in members(keys).items():
        order = sorted((row for row in group if not np.isnan(scores[row])), key=lambda row: -scores[row])
        wanted_groups += bool(order)
        every = [(a, b) for a, b in itertools.combinations(order, 2) if scores[a] - scores[b] > min_margin]
        own = ours.get(key, [])
        if strategy == "best-worst":
            assert own == [pair for pair in every if pair == (order[0], order[-1])]
        elif strategy == "best-random":
            eligible = [pair for pair in every if pair[0] == order[0]]
            assert set(own) <= set(eligible)
            assert len(own) == min(max_pairs, len(eligible))
        else:
            assert set(own) <= set(every)
            widths = sorted((float(scores[a] - scores[b]) for a, b in every), reverse=True)
            assert [float(scores[a] - scores[b]) for a, b in own] == widths[:max_pairs]
    assert found.num_groups == wanted_groups


def test_what_is_drawn_depends_on_the_seed_alone(rows: tuple[NDArray[np.uint64], NDArray[np.float32]]) -> None:
    keys, scores = rows

    def drawn(seed: int) -> list[int]:
        pairs = select_pairs(keys, scores, strategy="best-random", min_margin=0.0, max_pairs=1, seed=seed)
        rows: list[int] = pairs.rejected.tolist()
        return rows

    assert drawn(1) == drawn(1)
    differing = sum(one != other for one, other in zip(drawn(1), drawn(2), strict=True))
    assert differing > NUM_GROUPS // 2
