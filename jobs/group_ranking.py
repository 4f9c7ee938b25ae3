"""Ranks within groups, as pure functions of arrays: no Python runs once a row or once a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GroupRanks", "best_rows", "groups_of", "rank_groups"]


@dataclass(frozen=True, slots=True)
class GroupRanks:
    """For each row: its `rank`, -1 where it has none; its `group_size`, -1 where it has no group; its `margin`."""

    rank: NDArray[np.int32]
    group_size: NDArray[np.int32]
    margin: NDArray[np.float32]


def rank_groups(keys_N2: NDArray[np.uint64], scores_N: NDArray[np.float32]) -> GroupRanks:
    """Rank rows within the groups that their keys make, 0 the best; equal scores rank in the order given.

    Args:
        keys_N2: the group of each row; two zeros for none.
        scores_N: the score of each row; NaN for none, which ranks nowhere.

    Returns:
        Rank, group size (rows without a score are counted) and margin (the group's best score minus the row's, so 0
        for the best; NaN without a rank) of each row.
    """
    order_N, starts_G = groups_of(keys_N2, scores_N)
    sizes_G = np.diff(np.append(starts_G, len(order_N)))
    places_N = np.arange(len(order_N)) - np.repeat(starts_G, sizes_G)
    sorted_N = scores_N[order_N]
    best_N = np.repeat(sorted_N[starts_G], sizes_G)
    has_group_N: NDArray[np.bool_] = np.asarray(keys_N2.any(axis=1))[order_N]
    ranked_N = ~np.isnan(sorted_N) & has_group_N

    def unsorted(values_N: NDArray[Any], kind: type[np.generic]) -> NDArray[Any]:
        result_N = np.empty(len(order_N), kind)
        result_N[order_N] = values_N
        return result_N

    return GroupRanks(
        rank=unsorted(np.where(ranked_N, places_N, -1), np.int32),
        group_size=unsorted(np.where(has_group_N, np.repeat(sizes_G, sizes_G), -1), np.int32),
        margin=unsorted(np.where(ranked_N, best_N - sorted_N, np.nan), np.float32),
    )


def groups_of(
    keys_N2: NDArray[np.uint64], scores_N: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows by group and, within one, from the highest score to the lowest, NaN last: their indices, and where each
    group starts among them. Equal scores keep the order given."""
    order_N = np.lexsort((-scores_N, keys_N2[:, 1], keys_N2[:, 0]))
    sorted_N2 = keys_N2[order_N]
    is_start_N = np.ones(len(order_N), bool)
    is_start_N[1:] = (sorted_N2[1:] != sorted_N2[:-1]).any(axis=1)
    return order_N, np.flatnonzero(is_start_N)


def best_rows(scores_N: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The indices of the `k` highest scores, in input order; of equal scores the first. NaN is no score."""
    scored = scores_N[~np.isnan(scores_N)]
    if len(scored) <= k:
        return np.flatnonzero(~np.isnan(scores_N))
    threshold = np.partition(scored, len(scored) - k)[len(scored) - k]
    above = np.flatnonzero(scores_N > threshold)
    equal = np.flatnonzero(scores_N == threshold)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))
