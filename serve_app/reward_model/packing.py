"""Groups of token-id sequences -> packed batches: laid end to end under a token budget, without padding.

A packed batch is a list of spans. A trunk holds the tokens that a group's members share, once; each member's leaf
holds the rest, at its true positions. A sequence that shares nothing is a span of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve_app.reward_model.prefixes import Group


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start` to `start + num_rows - 1` of a packed batch: tokens of one sequence from `position` on.

    They attend to `trunk` first, the span that holds the positions before `position`, and then to each other.
    `is_scored` tells a sequence's last span from a trunk.
    """

    start: int
    num_rows: int
    position: int = 0
    trunk: Span | None = None
    is_scored: bool = True

    @property
    def num_keys(self) -> int:
        """Tokens that the span's last row attends to."""
        return self.position + self.num_rows

    @property
    def stop(self) -> int:
        return self.start + self.num_rows


@dataclass(frozen=True, slots=True)
class Read:
    """A place of a scored span's sequence where its hidden state is read; from there `num_keys` tokens are seen."""

    span: Span
    num_keys: int

    @property
    def row(self) -> int:
        """The row in the packed batch: one of the span's, or of its trunk's."""
        position = self.num_keys - 1
        part = self.span.trunk if self.span.trunk is not None and position < self.span.position else self.span
        return part.start + position - part.position


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Spans end to end. Shape legend: T rows, padding rows at the end included.

    `token_ids_T` is int64 on the device. A trunk stands right before its leaves; `members` are the indices of the
    sequences in the order of their scored spans. `reads` are in that order too, as many for each.
    """

    token_ids_T: Tensor
    spans: list[Span]
    members: list[int]
    reads: list[Read]

    @property
    def num_tokens(self) -> int:
        """Rows without the padding."""
        return self.spans[-1].stop

    @property
    def scored(self) -> list[Span]:
        return [span for span in self.spans if span.is_scored]

    @classmethod
    def build(
        cls,
        sequences: Sequence[Sequence[int]],
        groups: Sequence[Group],
        *,
        num_rows: int,
        device: torch.device,
        read_positions: Callable[[Sequence[int]], Sequence[int]] | None = None,
    ) -> PackedBatch:
        """Lay the groups' sequences out in `num_rows` rows; those left over repeat the last token, for nobody.

        `read_positions` tells where in a sequence hidden states are read; None is its last token.
        """
        ids: list[int] = []
        spans: list[Span] = []
        reads: list[Read] = []
        for group in groups:
            trunk = None
            if group.num_shared:
                trunk = Span(len(ids), group.num_shared, is_scored=False)
                spans.append(trunk)
                ids += sequences[group.members[0]][: group.num_shared]
            for member in group.members:
                own = sequences[member][group.num_shared :]
                span = Span(len(ids), len(own), group.num_shared, trunk)
                spans.append(span)
                if read_positions is None:
                    reads.append(Read(span, span.num_keys))
                else:
                    reads += (Read(span, position + 1) for position in read_positions(sequences[member]))
                ids += own
        ids += ids[-1:] * (num_rows - len(ids))
        members = [member for group in groups for member in group.members]
        return cls(on_device(torch.tensor(ids, dtype=torch.int64), device), spans, members, reads)


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """`host` on the device; to CUDA by way of pinned memory, so that nothing waits for the copy."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def pack(groups: Sequence[Group], lengths: Sequence[int], token_budget: Callable[[], int]) -> Iterator[list[Group]]:
    """Split groups, in order, into batches of at most `token_budget()` rows, asked for anew for each group.

    A group that is larger is split into several, which repeat its shared tokens only; a sequence that is longer than
    the budget is in a batch of its own.
    """
    batch: list[Group] = []
    num_rows = 0
    for group in groups:
        for part in _split(group, lengths, token_budget()):
            rows = part.num_rows(lengths)
            if batch and num_rows + rows > token_budget():
                yield batch
                batch, num_rows = [], 0
            batch.append(part)
            num_rows += rows
    if batch:
        yield batch


def halves(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """The same sequences in two parts of about as many members each."""
    middle = sum(len(group.members) for group in groups) // 2
    first: list[Group] = []
    second: list[Group] = []
    for group in groups:
        room = max(0, middle - sum(len(taken.members) for taken in first))
        for part, members in ((first, group.members[:room]), (second, group.members[room:])):
            if members:
                part.append(Group(group.num_shared, members))
    return first, second


def _split(group: Group, lengths: Sequence[int], token_budget: int) -> Iterator[Group]:
    members: list[int] = []
    num_rows = group.num_shared
    for member in group.members:
        own = lengths[member] - group.num_shared
        if members and num_rows + own > token_budget:
            yield Group(group.num_shared, tuple(members))
            members, num_rows = [], group.num_shared
        members.append(member)
        num_rows += own
    yield Group(group.num_shared, tuple(members))
