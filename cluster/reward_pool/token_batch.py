"""What travels between a pool and its actors: token ids out, scores back, each as flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from serve_app.reward_model import ScoringError

__all__ = ["ScoreReply", "TokenBatch"]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Sequences of token ids, end to end: `ids` int32 [sum of lengths], `starts` int64 [number of sequences + 1].

    In Ray's object store a batch is one object; actors on its node read the arrays where they lie.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> TokenBatch:
        starts = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(sequence) for sequence in sequences], out=starts[1:])
        ids = np.empty(int(starts[-1]), dtype=np.int32)
        for start, stop, sequence in zip(starts[:-1], starts[1:], sequences, strict=True):
            ids[start:stop] = sequence
        return cls(ids, starts)

    @property
    def num_bytes(self) -> int:
        return self.ids.nbytes + self.starts.nbytes

    def lists(self, first: int, stop: int) -> list[list[int]]:
        """Sequences `first` to `stop` - 1."""
        bounds = self.starts[first : stop + 1].tolist()
        return [self.ids[begin:end].tolist() for begin, end in pairwise(bounds)]


@dataclass(frozen=True, slots=True)
class ScoreReply:
    """A float32 score for each sequence, in order. Those in `errors`, by place, have none.

    `weights_version` is the number of the weights that all of them were computed with.
    """

    scores: NDArray[np.float32]
    errors: dict[int, ScoringError] = field(default_factory=dict)
    weights_version: int = 0

    @classmethod
    def of(cls, outcomes: Sequence[float | ScoringError], weights_version: int) -> ScoreReply:
        errors = {place: outcome for place, outcome in enumerate(outcomes) if isinstance(outcome, ScoringError)}
        values = [0.0 if isinstance(outcome, ScoringError) else outcome for outcome in outcomes]
        return cls(np.array(values, dtype=np.float32), errors, weights_version)

    def outcomes(self) -> list[float | ScoringError]:
        """The score of each sequence, in order, or its error."""
        return [self.errors.get(place, value) for place, value in enumerate(self.scores.tolist())]
