"""Token-id sequences -> packed batches: laid end to end under a token budget, no padding between them.

Packing is arithmetic on lengths; `PackedBatch.build` then makes the tensors that `decoder.py` takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["PackedBatch", "pack"]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences end to end. Shape legend: T tokens of all sequences, padding rows at the end included; N sequences.

    `token_ids_T` is int64 on the device; `starts[i]` and `lengths[i]` say where sequence i stands.
    """

    token_ids_T: Tensor
    starts: list[int]
    lengths: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens without the padding rows."""
        return sum(self.lengths)

    @property
    def last_rows(self) -> list[int]:
        """The row of each sequence's last token, where its score is read."""
        return [start + length - 1 for start, length in zip(self.starts, self.lengths, strict=True)]

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]], *, num_rows: int, device: torch.device) -> PackedBatch:
        """Lay `sequences` end to end in `num_rows` rows; the rows left over hold token 0 and belong to nobody."""
        lengths = [len(sequence) for sequence in sequences]
        flat = [token for sequence in sequences for token in sequence]
        flat += [0] * (num_rows - len(flat))
        token_ids_T = torch.tensor(flat, dtype=torch.int64)
        if device.type == "cuda":
            token_ids_T = token_ids_T.pin_memory()
        starts = [0, *accumulate(lengths)][:-1]
        return cls(token_ids_T.to(device, non_blocking=True), starts, lengths)


def pack(lengths: Sequence[int], token_budget: int) -> Iterator[range]:
    """Split sequences, in order, into runs of at most `token_budget` tokens; a longer one is a run of its own."""
    first, tokens = 0, 0
    for index, length in enumerate(lengths):
        if tokens and tokens + length > token_budget:
            yield range(first, index)
            first, tokens = index, 0
        tokens += length
    if tokens:
        yield range(first, len(lengths))
