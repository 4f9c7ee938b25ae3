"""The form in which tokens and scores cross processes: a `TokenBatch` out, a `ScoreReply` back.

The endpoint, jobs that score through it and pools of reward actors all send these. Arrays are flat, so that Ray moves
them without pickling each number; a batch in its object store is read where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve_app.batching.errors import ForwardError
from serve_app.reward_model.errors import ScoringError
from serve_app.reward_model.prefixes import MIN_SHARED_TOKENS
from serve_app.reward_model.scores import Outputs


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Sequences of token ids, in order. Each carries what it does not have in common with the one before it: one long
    sequence that is read in several places, as after each turn or step, travels once.

    `ids` int32 [tokens carried] are the sequences' own tokens, end to end; `starts` int64 [number of sequences + 1]
    says where each begins; `shared` int32 [number of sequences] is how many tokens of the one before stand in front of
    a sequence's own.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    shared: NDArray[np.int32]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> TokenBatch:
        """The batch of sequences, in order; none makes an empty batch."""
        own: list[NDArray[np.int32]] = []
        shared = np.zeros(len(sequences), dtype=np.int32)
        before = np.empty(0, dtype=np.int32)
        for place, sequence in enumerate(sequences):
            whole = np.asarray(sequence, dtype=np.int32)
            shared[place] = _num_shared(before, whole)
            own.append(whole[shared[place] :])
            before = whole
        starts = np.zeros(len(own) + 1, dtype=np.int64)
        np.cumsum([len(tokens) for tokens in own], out=starts[1:])
        return cls(np.concatenate([before[:0], *own]), starts, shared)

    @property
    def num_sequences(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence, counted whole: int64 [number of sequences]."""
        own: NDArray[np.int64] = np.diff(self.starts)
        return own + self.shared

    def num_tokens(self, first: int = 0, stop: int | None = None) -> int:
        """Tokens of sequences `first` to `stop` - 1, each counted whole."""
        return int(self.lengths[first:stop].sum())

    def lists(self, first: int = 0, stop: int | None = None) -> list[list[int]]:
        """The token ids of sequences `first` to `stop` - 1."""
        stop = self.num_sequences if stop is None else stop
        start = first
        while 0 < start < stop and self.shared[start]:
            start -= 1
        bounds = self.starts[start : stop + 1].tolist()
        sequences: list[list[int]] = []
        before: list[int] = []
        for (begin, end), shared in zip(pairwise(bounds), self.shared[start:stop].tolist(), strict=True):
            before = before[:shared] + self.ids[begin:end].tolist()
            sequences.append(before)
        return sequences[first - start :]


def _num_shared(before: NDArray[np.int32], sequence: NDArray[np.int32]) -> int:
    """Tokens that both begin with; 0 where they are too few to be worth a word."""
    shortest = min(len(before), len(sequence))
    if shortest < MIN_SHARED_TOKENS or (before[:MIN_SHARED_TOKENS] != sequence[:MIN_SHARED_TOKENS]).any():
        return 0
    differs = before[:shortest] != sequence[:shortest]
    return int(differs.argmax()) if differs.any() else shortest


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a process did not try: it is `"overloaded"` or `"unavailable"`, the `"deadline"` is past, or it has
    `"another_model"` than the caller asks for. After `retry_after_s` seconds it may be asked again.
    """

    reason: Literal["overloaded", "unavailable", "deadline", "another_model"]
    retry_after_s: int = 1


@dataclass(frozen=True, slots=True)
class ScoreReply:
    """The scores of a batch, float32 [number of sequences], in order; those in `errors`, by place, have none.

    `attributes`, float32 [number of sequences, A], are those of a model that has any: see `HeadConfig.attributes`.
    `processor` is the kind that they were computed on: see `processor.py`.
    With a `refusal` or a `failure` there are no scores at all: the batch was not tried, or the forward pass failed for
    all of it, so that another process may do better. `weights_version` is the number of the weights that all scores
    were computed with, where those can change.
    """

    scores: NDArray[np.float32]
    errors: dict[int, ScoringError] = field(default_factory=dict)
    refusal: Refusal | None = None
    failure: ForwardError | None = None
    weights_version: int = 0
    attributes: NDArray[np.float32] | None = None
    processor: str = ""

    @classmethod
    def of(cls, outcomes: Sequence[Outputs | ScoringError], *, weights_version: int = 0) -> ScoreReply:
        """The reply with what the model says of each sequence, in order."""
        errors = {place: outcome for place, outcome in enumerate(outcomes) if isinstance(outcome, ScoringError)}
        width = next((len(outcome) for outcome in outcomes if not isinstance(outcome, ScoringError)), 1)
        values = np.zeros((len(outcomes), width), dtype=np.float32)
        for place, outcome in enumerate(outcomes):
            if not isinstance(outcome, ScoringError):
                values[place] = outcome
        attributes = values[:, 1:] if width > 1 else None
        return cls(values[:, 0], errors, weights_version=weights_version, attributes=attributes)

    @classmethod
    def without(cls, reason: Refusal | ForwardError) -> ScoreReply:
        """The reply without scores, for the reason given."""
        none = np.empty(0, dtype=np.float32)
        if isinstance(reason, Refusal):
            return cls(none, refusal=reason)
        return cls(none, failure=reason)

    def outcomes(self) -> list[float | ScoringError]:
        """The score of each sequence, in order, or its error.

        Raises:
            ValueError: there are none; look at `refusal` and `failure` first.
        """
        self._check()
        return [self.errors.get(place, value) for place, value in enumerate(self.scores.tolist())]

    def outputs(self) -> list[Outputs | ScoringError]:
        """Like `outcomes`, with the attributes behind each score where the model has any."""
        self._check()
        rows = self.scores[:, None] if self.attributes is None else np.column_stack([self.scores, self.attributes])
        return [self.errors.get(place, row) for place, row in enumerate(rows.tolist())]

    def _check(self) -> None:
        if self.refusal is not None or self.failure is not None:
            raise ValueError(f"there are no scores: {self.refusal or self.failure}")
