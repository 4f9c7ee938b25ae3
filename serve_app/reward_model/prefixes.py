"""Which sequences begin with the same tokens, so that the model reads those once: a partition, chosen to save most.

Sequences are sorted, so that those with long common prefixes stand beside each other. The common prefixes of
neighbours form a tree of nested ranges; from the leaves up, each range keeps the groups inside it or takes them into
one of its own, whichever saves more tokens. Prefixes are shared on one level: a group has one trunk and its members'
rests.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# A leaf costs some copies of keys and values in every layer, which is the time of about this many tokens in a small
# model and of fewer in a large one: shorter prefixes are read again.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences, by index, that share their first `num_shared` tokens (0 where a sequence stands alone)."""

    num_shared: int
    members: tuple[int, ...]

    def num_rows(self, lengths: Sequence[int]) -> int:
        """Tokens the model reads: the shared ones once, and each member's own."""
        return self.num_shared + sum(lengths[member] - self.num_shared for member in self.members)


@dataclass(slots=True, eq=False)
class _Range:
    """Sorted places `first` to `stop` - 1, which share `num_shared` tokens, and the ranges inside that share more.

    `close` decides: the places in no inner range, and the inner ranges that save less on their own, are one group of
    this range, its pool; the other inner ranges keep their best groups. `saved` is what that saves, in tokens.
    """

    num_shared: int
    first: int
    stop: int = 0
    inner: list[_Range] = field(default_factory=list)
    pooled: list[_Range] = field(default_factory=list)
    saved: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.first

    def close(self, stop: int) -> None:
        self.stop = stop
        pooled = [inner for inner in self.inner if inner.size * self.num_shared > inner.saved]
        num_lone = self.size - sum(inner.size for inner in self.inner)
        pool_size = num_lone + sum(inner.size for inner in pooled)
        apart = sum(inner.saved for inner in self.inner)
        with_pool = apart + sum(inner.size * self.num_shared - inner.saved for inner in pooled) - self.num_shared
        if pool_size > 1 and (num_lone or with_pool > apart):
            self.pooled = pooled
            self.saved = with_pool + num_lone * self.num_shared
        else:
            self.saved = apart

    def pool(self) -> list[int]:
        """The places of the pool."""
        kept = [inner for inner in self.inner if inner not in self.pooled]
        taken = {place for inner in kept for place in range(inner.first, inner.stop)}
        return [place for place in range(self.first, self.stop) if place not in taken]


def group_by_prefix(sequences: Sequence[Sequence[int]], *, longest: int | None = None) -> list[Group]:
    """Partition sequences into groups with a common prefix of at least `MIN_SHARED_TOKENS`, and lone ones.

    A member keeps at least one token of its own, where its score is read. A sequence of more than `longest` tokens
    shares nothing: its rotary angles are its own. Groups come in the order of their first
    members, members in input order. Time and memory grow with the number of tokens, and with n log n comparisons.
    """
    arrays = [np.asarray(sequence, dtype=">u4") for sequence in sequences]
    keys = [array.tobytes() for array in arrays]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = [0] * (len(order) + 1)  # common[i]: tokens that sorted places i - 1 and i share
    head = MIN_SHARED_TOKENS * arrays[0].itemsize if arrays else 0
    for place in range(1, len(order)):
        before, here = order[place - 1], order[place]
        if longest is not None and max(len(arrays[before]), len(arrays[here])) > longest:
            continue
        if keys[before][:head] == keys[here][:head]:
            common[place] = _common_prefix(arrays[before], arrays[here])
    groups = _best_groups(_ranges(common), order)
    return sorted(groups, key=lambda group: group.members[0])


def _common_prefix(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> int:
    """Tokens the two share at their start, less than the length of either; 0 where that is too few to share."""
    shortest = min(len(first), len(second))
    differs = np.flatnonzero(first[:shortest] != second[:shortest])
    shared = min(int(differs[0]) if len(differs) else shortest, shortest - 1)
    return shared if shared >= MIN_SHARED_TOKENS else 0


def _ranges(common: list[int]) -> _Range:
    """The tree of ranges that neighbours' common prefixes make, its root over all places with nothing shared."""
    open_ranges = [_Range(num_shared=0, first=0)]
    for place in range(1, len(common)):
        first = place - 1
        closed = None
        while open_ranges[-1].num_shared > common[place]:
            if closed is not None:
                open_ranges[-1].inner.append(closed)
            closed = open_ranges.pop()
            closed.close(place)
            first = closed.first
        if open_ranges[-1].num_shared < common[place]:
            open_ranges.append(_Range(num_shared=common[place], first=first))
        if closed is not None:
            open_ranges[-1].inner.append(closed)
    open_ranges[0].close(len(common) - 1)
    return open_ranges[0]


def _best_groups(root: _Range, order: list[int]) -> list[Group]:
    groups: list[Group] = []
    waiting = [root]
    while waiting:
        found = waiting.pop()
        members = sorted(order[place] for place in found.pool())
        if found.num_shared and len(members) > 1:
            groups.append(Group(found.num_shared, tuple(members)))
        else:
            groups += [Group(0, (member,)) for member in members]
        waiting += [inner for inner in found.inner if inner not in found.pooled]
    return groups


def together(count: int, key: Callable[[int], Hashable]) -> list[int]:
    """0 to `count` - 1, those with equal keys beside each other, keys in order of first appearance."""
    places: dict[Hashable, list[int]] = {}
    for place in range(count):
        places.setdefault(key(place), []).append(place)
    return [place for group in places.values() for place in group]
