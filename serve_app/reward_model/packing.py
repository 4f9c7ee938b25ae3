"""Branches of token-id sequences -> packed batches: laid end to end under a token budget, without padding.

A packed batch is a list of spans. The first of a run is a whole sequence, the spine; each span behind it holds what a
branch has of its own, at its true positions. The rows of one sequence, from position 0 on, are its path: what the
spans before its own left there, then its own. A sequence that shares nothing is a span of its own, and one that is a
prefix of what was laid before has no span, only reads. Where keys and values of a sequence's first tokens are in a
cache, its path has rows behind the batch's own, which nobody computes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.reward_model.prefixes import Branch

# A batch's spine may exceed the budget, as any sequence may, and its branches by this part of the spine: read apart
# they would exceed it all the same, each with the spine's tokens anew.
BRANCHES_OVER_BUDGET = 1 / 8
# A batch that is not filled costs what it lacks, times this, in tokens.
COST_OF_LACKING = 1 / 32
UNREAD = -1
"""In place of a row's number, where a path's keys are in a cache."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start` to `start + num_rows - 1` of a packed batch: tokens of one sequence from `position` on.

    They attend to the path before `position` first, and then to each other.
    """

    start: int
    num_rows: int
    position: int = 0

    @property
    def num_keys(self) -> int:
        """Tokens that the span's last row attends to."""
        return self.position + self.num_rows

    @property
    def stop(self) -> int:
        return self.start + self.num_rows


@dataclass(frozen=True, slots=True)
class CachedRows:
    """Rows of keys and values behind a batch's own, that a cache fills: `span` of the sequence numbered `sequence`."""

    sequence: int
    span: Span


@dataclass(frozen=True, slots=True)
class Read:
    """A place where a hidden state is read: `row` of the packed batch, which sees the first `num_keys` rows of the path
    that the spans up to number `span` make.
    """

    span: int
    num_keys: int
    row: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Spans end to end. Shape legend: T rows, padding rows at the end included.

    `token_ids_T` is int64 on the device. `members` are the indices of the sequences, in the order of their branches,
    and `reads` are in that order too, as many for each. `ends` are the numbers of the spans that end the members'
    paths, and `cached` has what is put on the path before a span, by its number.
    """

    token_ids_T: Tensor
    spans: list[Span]
    members: list[int]
    reads: list[Read]
    ends: list[int] = field(default_factory=list)
    cached: dict[int, CachedRows] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Rows without the padding."""
        return self.spans[-1].stop

    @property
    def shares(self) -> bool:
        """Whether any span attends to rows of another."""
        return any(span.position for span in self.spans)

    @property
    def num_cached(self) -> int:
        """Rows of keys and values behind the batch's own."""
        return sum(rows.span.num_rows for rows in self.cached.values())

    def num_kept(self, number: int) -> int:
        """Positions before span `number` whose rows the spans before it left on the path."""
        cached = self.cached.get(number)
        return self.spans[number].position if cached is None else cached.span.position

    def paths(self) -> list[NDArray[np.int64]]:
        """The rows of each span's sequence from position 0 on, its own at the end: int64 [num_keys] each."""
        path = np.empty(max(span.num_keys for span in self.spans), dtype=np.int64)
        paths = []
        for number, span in enumerate(self.spans):
            cached = self.cached.get(number)
            for part in (span,) if cached is None else (cached.span, span):
                path[part.position : part.num_keys] = np.arange(part.start, part.stop)
            paths.append(path[: span.num_keys].copy())
        return paths

    @classmethod
    def build(
        cls,
        sequences: Sequence[Sequence[int]],
        branches: Sequence[Branch],
        *,
        padded: Callable[[int], int],
        device: torch.device,
        read_positions: Callable[[Sequence[int]], Sequence[int]] | None = None,
    ) -> PackedBatch:
        """Lay the branches' sequences out.

        Args:
            padded: how many rows to make of a number of tokens; those left over repeat the last token, for nobody.
            read_positions: tells where in a sequence hidden states are read; None is its last token.
        """
        layout = _Layout()
        reads: list[Read] = []
        ends: list[int] = []
        for branch in branches:
            sequence = sequences[branch.sequence]
            positions = [len(sequence) - 1] if read_positions is None else read_positions(sequence)
            layout.add(sequence, branch, positions)
            ends.append(len(layout.spans) - 1)
            reads += (Read(ends[-1], position + 1, layout.path[position]) for position in positions)
        ids = layout.ids
        num_rows = padded(len(ids))
        ids += ids[-1:] * (num_rows - len(ids))
        members = [branch.sequence for branch in branches]
        token_ids_T = on_device(torch.frombuffer(array("q", ids), dtype=torch.int64), device)
        return cls(token_ids_T, layout.spans, members, reads, ends, dict(layout.cached(num_rows)))


@dataclass(slots=True)
class _Layout:
    """The batch that is being built. On `path` are the rows of the sequence added last, `UNREAD` where a cache has
    its keys, and `known` has sequence, first position and end of those that a cache has, by span.
    """

    ids: list[int] = field(default_factory=list)
    path: Sequence[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    known: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def add(self, sequence: Sequence[int], branch: Branch, positions: Sequence[int]) -> None:
        """Lay out what the branch has of its own, from the first position on that is read and that nobody computes."""
        if not branch.num_known:
            self.path = range(len(self.ids), len(self.ids) + len(sequence))
            self.spans.append(Span(len(self.ids), len(sequence)))
            self.ids += sequence
            return
        kept = branch.num_shared
        self.path = path = list(self.path)
        path[kept:] = [UNREAD] * (branch.num_known - kept)
        first = min((place for place in positions if place >= len(path) or path[place] == UNREAD), default=len(path))
        first = min(first, len(path))
        if first > kept:
            self.known[len(self.spans)] = (branch.sequence, kept, first)
        own = sequence[first:]
        if own:
            path[first:] = range(len(self.ids), len(self.ids) + len(own))
            self.spans.append(Span(len(self.ids), len(own), first))
            self.ids += own

    def cached(self, num_rows: int) -> Iterator[tuple[int, CachedRows]]:
        """What a cache puts behind the batch's rows, by span."""
        for number, (sequence, first, stop) in self.known.items():
            yield number, CachedRows(sequence, Span(num_rows, stop - first, first))
            num_rows += stop - first


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """`host` on the device; to CUDA by way of pinned memory, so that nothing waits for the copy."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def num_rows(branches: Sequence[Branch], lengths: Sequence[int]) -> int:
    """Tokens that the model reads of a batch's branches."""
    return sum(branch.num_own(lengths) for branch in branches)


def pack(
    branches: Sequence[Branch],
    lengths: Sequence[int],
    token_budget: Callable[[], int],
    *,
    rows_per_key: float = 0.0,
) -> Iterator[list[Branch]]:
    """Split branches, in order, into batches of at most `token_budget()` rows, asked for anew for each branch.

    A batch is split where least is read again, and where it is nearly full. A sequence that is longer than the budget
    is in a batch of its own, with the branches that add little to it: see `BRANCHES_OVER_BUDGET`. A branch without
    tokens of its own counts as a row, since the last layer is computed for it.

    Args:
        branches: a plan of `branch_by_prefix`.
        lengths: tokens of every sequence.
        token_budget: rows of a batch at most.
        rows_per_key: what a key counts, in rows, of those that are copied in every layer: all those of a batch in
            which sequences share. 0 where nothing is copied.
    """
    batch = _OpenBatch(lengths, rows_per_key)
    for branch in branches:
        while not batch.has_room(branch, token_budget()):
            yield batch.split(branch, token_budget())
        batch.add(branch)
    if batch.branches:
        yield batch.branches


def halves(branches: Sequence[Branch]) -> tuple[list[Branch], list[Branch]]:
    """The same sequences in two parts of about as many."""
    middle = len(branches) // 2
    return list(branches[:middle]), _from_spine(branches[middle:])


def _from_spine(branches: Sequence[Branch]) -> list[Branch]:
    """The branches, the first of them without one before it."""
    return [branch if place else branch.alone for place, branch in enumerate(branches)]


@dataclass(slots=True)
class _OpenBatch:
    """The batch that is being filled, and what its first branches come to: rows and keys of the first 0, 1, 2...

    `num_runs` counts branches that share with none before them, `num_whole` those that are read whole.
    """

    lengths: Sequence[int]
    rows_per_key: float
    branches: list[Branch] = field(default_factory=list)
    num_rows: list[int] = field(default_factory=lambda: [0])
    num_keys: list[int] = field(default_factory=lambda: [0])
    num_runs: int = 0
    num_whole: int = 0

    def add(self, branch: Branch) -> None:
        if not self.branches:
            branch = branch.alone
        self.branches.append(branch)
        self.num_rows.append(self.num_rows[-1] + max(1, branch.num_own(self.lengths)))
        self.num_keys.append(self.num_keys[-1] + self._keys_of(branch))
        self.num_runs += branch.num_shared == 0
        self.num_whole += branch.num_known == 0

    def has_room(self, branch: Branch, budget: int) -> bool:
        if not self.branches:
            return True
        rows = self.num_rows[-1] + max(1, branch.num_own(self.lengths))
        keys = self.num_keys[-1] + self._keys_of(branch)
        if not branch.num_known and self.num_whole == len(self.branches):
            keys = 0
        if branch.num_shared and self.num_runs == 1:
            spine = self.num_rows[1]
            budget = max(budget, spine + int(spine * BRANCHES_OVER_BUDGET))
        return rows + self.rows_per_key * keys <= budget

    def split(self, following: Branch, budget: int) -> list[Branch]:
        """Take branches off the front, as many as make the best batch; those left stay, with a spine of their own."""
        ends = [*self.branches[1:], following]
        lacking = [max(0, budget - rows) * COST_OF_LACKING for rows in self.num_rows[1:]]
        costs = [end.num_known - end.num_cached + lack for end, lack in zip(ends, lacking, strict=True)]
        count = max(range(1, len(costs) + 1), key=lambda count: (-costs[count - 1], count))
        taken, left = self.branches[:count], self.branches[count:]
        self.branches, self.num_rows, self.num_keys, self.num_runs, self.num_whole = [], [0], [0], 0, 0
        for branch in left:
            self.add(branch)
        return taken

    def _keys_of(self, branch: Branch) -> int:
        """Keys that are copied for a branch where sequences share: its own path, and what a cache gives for it."""
        return self.lengths[branch.sequence] + branch.num_known - branch.num_shared
