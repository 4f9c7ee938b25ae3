"""Which sequences begin with the same tokens, at any depth, so that the model reads every prefix once.

In descending order, extensions before their prefixes, every sequence shares most with the one right before it. So the
plan is that order, and how much each shares with its predecessor. The first of a run is a spine; the others branch off
where they depart from it or from an earlier branch, and one that is a prefix of its predecessor costs nothing but a
read. Branches of a sequence come from its end to its start: a reader that keeps one path of keys from position 0 on,
and overwrites it from each branch's first token of its own, always has the right ones before that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

# A branch costs some copies of keys and values in every layer, which is the time of about this many tokens in a small
# model and of fewer in a large one: shorter prefixes are read again.
MIN_SHARED_TOKENS = 16
_TOKEN = np.dtype(">u4")  # bytes of big-endian numbers sort as the numbers do


@dataclass(frozen=True, slots=True)
class Branch:
    """A sequence, by index, and how many of its first tokens the sequence before it in the plan begins with, too.

    With 0 it is read whole. With its full length it is a prefix of what was read before, and nothing is. The keys of
    its first `num_cached` tokens are in a `PrefixCache`.
    """

    sequence: int
    num_shared: int = 0
    num_cached: int = 0

    @property
    def num_known(self) -> int:
        """Its first tokens that the model need not read again."""
        return self.num_shared if self.num_shared > self.num_cached else self.num_cached  # faster than `max`

    @property
    def alone(self) -> Branch:
        """The same sequence without one before it."""
        return Branch(self.sequence, num_cached=self.num_cached)

    def num_own(self, lengths: Sequence[int]) -> int:
        """Tokens that the model reads for it."""
        return lengths[self.sequence] - self.num_known


def branch_by_prefix(sequences: Sequence[Sequence[int]], *, longest: int | None = None) -> list[Branch]:
    """The order to read sequences in, each with what it shares with its predecessor.

    A sequence shares at least `MIN_SHARED_TOKENS`, or all its tokens, or nothing. One of more than `longest` tokens
    shares nothing: its rotary angles are its own. Runs of sequences that share come in the order of the least index
    among them. Time and memory grow with the number of tokens, and with n log n comparisons.
    """
    keys = [sort_key(sequence) for sequence in sequences]
    able = [place for place in range(len(keys)) if longest is None or len(sequences[place]) <= longest]
    order = sorted(able, key=keys.__getitem__, reverse=True)
    runs = [[Branch(place)] for place in range(len(keys)) if longest is not None and len(sequences[place]) > longest]
    before = b""
    for place in order:
        num_shared = _num_shared(before, keys[place])
        if num_shared:
            runs[-1].append(Branch(place, num_shared))
        else:
            runs.append([Branch(place)])
        before = keys[place]
    runs.sort(key=lambda run: min(branch.sequence for branch in run))
    return [branch for run in runs for branch in run]


def sort_key(sequence: Sequence[int]) -> bytes:
    """The key of a sequence: in descending order of these, each shares most with its predecessor."""
    return np.asarray(sequence, dtype=_TOKEN).tobytes()


def num_rows(before: bytes, key: bytes) -> int:
    """Rows of a pass for a sequence, by its key, behind another or none (an empty one): its own tokens, at least 1."""
    return max(1, len(key) // _TOKEN.itemsize - _num_shared(before, key))


def _num_shared(before: bytes, key: bytes) -> int:
    """Tokens of `key` that `before`, which sorts behind it or is its equal, begins with; 0 where they are too few."""
    size = _TOKEN.itemsize
    if before.startswith(key):
        return len(key) // size
    head = MIN_SHARED_TOKENS * size
    if before[:head] != key[:head]:
        return 0
    shortest = min(len(before), len(key)) // size
    first, second = (np.frombuffer(one, dtype=_TOKEN, count=shortest) for one in (before, key))
    return int((first != second).argmax())


def together(count: int, key: Callable[[int], Hashable]) -> list[int]:
    """0 to `count` - 1, those with equal keys beside each other, keys in order of first appearance."""
    places: dict[Hashable, list[int]] = {}
    for place in range(count):
        places.setdefault(key(place), []).append(place)
    return [place for group in places.values() for place in group]


def in_tree_order(paths: Sequence[Sequence[Hashable]]) -> list[int]:
    """Places of paths, those with a common beginning beside each other, in order of first appearance at every level.

    A path comes before those that extend it, equal ones in their order.
    """
    numbers: dict[tuple[int, Hashable], int] = {}
    keys: list[list[int]] = []
    for path in paths:
        key = [-1]
        for part in path:
            key.append(numbers.setdefault((key[-1], part), len(numbers)))
        keys.append(key)
    return sorted(range(len(paths)), key=keys.__getitem__)
