"""Which candidates of a prompt make preference pairs: pure functions of arrays, nothing runs once a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jobs.group_ranking import groups_of

__all__ = ["Pairs", "Strategy", "select_pairs"]

Strategy = Literal["best-worst", "best-random", "all"]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of rows by their indices. Those of a group stand together, the widest margin first."""

    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]
    num_groups: int
    num_paired: int
    """Groups that have at least one pair."""


@dataclass(frozen=True, slots=True)
class _Groups:
    """Scored rows by group, the best first: `order` are their indices, a group starts at `starts` and has `sizes`."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    scores: NDArray[np.float32]


def select_pairs(
    keys_N2: NDArray[np.uint64],
    scores_N: NDArray[np.float32],
    *,
    strategy: Strategy,
    min_margin: float,
    max_pairs: int,
    seed: int,
) -> Pairs:
    """Pairs of rows of one group whose scores differ by more than `min_margin`.

    Args:
        keys_N2: the group of each row; two zeros for none.
        scores_N: the score of each row; NaN for none.
        strategy: `best-worst`; `best-random`, where the rejected ones are drawn without repetition; or `all`, of which
            those with the widest margins are taken.
        min_margin: 0 or more; equal scores never make a pair.
        max_pairs: pairs of one group at most.
        seed: decides what `best-random` draws, together with the group and the places of its rows.

    Returns:
        The pairs, groups in the order of their first row.
    """
    groups = _scored_groups(keys_N2, scores_N)
    if strategy == "best-worst":
        group, chosen, rejected = _best_worst(groups)
    elif strategy == "best-random":
        group, chosen, rejected = _best_random(groups, keys_N2, min_margin, max_pairs, seed)
    else:
        group, chosen, rejected = _widest(groups, max_pairs)
    margin = groups.scores[chosen] - groups.scores[rejected]
    wide = margin > min_margin
    group, chosen, rejected, margin = group[wide], chosen[wide], rejected[wide], margin[wide]
    first_row = np.minimum.reduceat(groups.order, groups.starts) if len(groups.starts) else groups.starts
    by_group = np.lexsort((rejected, chosen, -margin, first_row[group]))
    kept = by_group[_place_in_run(group[by_group]) < max_pairs]
    return Pairs(
        chosen=groups.order[chosen[kept]],
        rejected=groups.order[rejected[kept]],
        num_groups=len(groups.starts),
        num_paired=len(np.unique(group[kept])),
    )


def _scored_groups(keys_N2: NDArray[np.uint64], scores_N: NDArray[np.float32]) -> _Groups:
    scored = np.flatnonzero(~np.isnan(scores_N) & np.asarray(keys_N2.any(axis=1)))
    order, starts = groups_of(keys_N2[scored], scores_N[scored])
    rows = scored[order]
    return _Groups(rows, starts, np.diff(np.append(starts, len(rows))), scores_N[rows])


_Choice = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]  # group, place of chosen, place of rejected


def _best_worst(groups: _Groups) -> _Choice:
    return np.arange(len(groups.starts)), groups.starts, groups.starts + groups.sizes - 1


def _best_random(groups: _Groups, keys_N2: NDArray[np.uint64], min_margin: float, max_pairs: int, seed: int) -> _Choice:
    """The best row of each group against those with the smallest of pseudo-random numbers."""
    group = np.repeat(np.arange(len(groups.starts)), groups.sizes)
    best = np.repeat(groups.starts, groups.sizes)
    places = np.arange(len(group))
    eligible = np.flatnonzero(groups.scores[best] - groups.scores > min_margin)
    in_group = (places - best).astype(np.uint64)
    drawn = _mixed(keys_N2[groups.order, 1] + _mixed(in_group + np.uint64(seed)))[eligible]
    order = eligible[np.lexsort((drawn, group[eligible]))]
    kept = order[_place_in_run(group[order]) < max_pairs]
    return group[kept], best[kept], kept


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Pseudo-random numbers, the same for the same values: SplitMix64 (Steele, Lea, Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _widest(groups: _Groups, max_pairs: int) -> _Choice:
    """Pairs among which the `max_pairs` widest of each group are.

    Of the i-th best against the j-th worst, (i + 1)(j + 1) - 1 other pairs are as wide or wider; so those with
    (i + 1)(j + 1) <= max_pairs hold the widest.
    """
    found: list[_Choice] = []
    for i in range(max_pairs):
        for j in range(max_pairs // (i + 1)):
            (group,) = np.nonzero(groups.sizes >= i + j + 2)
            if not len(group):
                break
            start = groups.starts[group]
            found.append((group, start + i, start + groups.sizes[group] - 1 - j))
    empty = np.empty(0, np.int64)
    return tuple(np.concatenate([empty, *(choice[part] for choice in found)]) for part in range(3))  # type: ignore[return-value]


def _place_in_run(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each element in its run of equal ones."""
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])) if len(values) else values
    return np.arange(len(values)) - np.repeat(starts, np.diff(np.append(starts, len(values))))
