"""Tokens and scores as they cross processes: whole, in order, with the same bits."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from serve_app.batching.errors import ForwardError
from serve_app.batching.wire import Refusal, ScoreReply, TokenBatch
from serve_app.reward_model import NonFiniteScoreError, ScoringError, TokenIdsError
from serve_app.reward_model.scores import Outputs

SEQUENCES = [[1, 2, 3], [], [4], [92543, 0]]


def test_sequences_come_back_as_they_were() -> None:
    batch = pickle.loads(pickle.dumps(TokenBatch.of(SEQUENCES)))
    assert batch.lists() == SEQUENCES
    assert (batch.num_sequences, batch.num_tokens()) == (4, 6)
    assert batch.lengths.tolist() == [3, 0, 1, 2]
    assert batch.ids.dtype == np.int32
    assert all(type(token) is int for sequence in batch.lists() for token in sequence)


def test_a_stretch_of_a_batch_is_read_alone() -> None:
    batch = TokenBatch.of(SEQUENCES)
    for first in range(5):
        for stop in range(first, 5):
            assert batch.lists(first, stop) == SEQUENCES[first:stop]
            assert batch.num_tokens(first, stop) == sum(map(len, SEQUENCES[first:stop]))


def test_what_a_sequence_shares_with_the_one_before_travels_once() -> None:
    """Turns: each is the one before with more behind it, and ends in a token of its own; then pure prefixes."""
    spine = list(range(1000))
    turns = [[*spine[: 100 * turn], 9999] for turn in range(1, 11)]
    reads = [spine[: 100 * step] for step in range(10, 0, -1)]
    short = [[1, 2, 3], [1, 2, 3, 4], []]
    sequences = [*turns, *reads, *short, *reads[:2]]
    batch = pickle.loads(pickle.dumps(TokenBatch.of(sequences)))
    assert batch.lists() == sequences
    assert len(batch.ids) == 1010 + 0 + 7 + 1000
    assert batch.lengths.tolist() == list(map(len, sequences))
    for first in range(len(sequences)):
        for stop in (first, first + 1, len(sequences)):
            assert batch.lists(first, stop) == sequences[first:stop]
            assert batch.num_tokens(first, stop) == sum(map(len, sequences[first:stop]))


def test_an_empty_batch_is_one() -> None:
    batch = TokenBatch.of([])
    assert (batch.lists(), batch.num_sequences, batch.num_tokens()) == ([], 0, 0)


def test_every_float32_keeps_its_bits_and_every_error_its_place() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 2000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    outcomes: list[Outputs | ScoringError] = [[value] for value in values.tolist()]
    outcomes += [NonFiniteScoreError("nan"), [-0.0], TokenIdsError("empty")]
    reply = pickle.loads(pickle.dumps(ScoreReply.of(outcomes, weights_version=3)))
    found = reply.outcomes()
    assert np.array_equal(np.array(found[: len(values)], dtype=np.float32).view(np.uint32), values.view(np.uint32))
    assert [type(found[at]) for at in (-3, -2, -1)] == [NonFiniteScoreError, float, TokenIdsError]
    assert np.signbit(found[-2])
    assert reply.weights_version == 3


def test_attributes_stand_behind_each_score() -> None:
    rows: list[Outputs | ScoringError] = [TokenIdsError("empty"), [0.5, 1.0, -2.0], [1.5, 3.0, 0.25]]
    reply = pickle.loads(pickle.dumps(ScoreReply.of(rows)))
    assert reply.outputs()[1:] == rows[1:]
    assert reply.outcomes()[1:] == [0.5, 1.5]
    assert isinstance(reply.outputs()[0], TokenIdsError)
    assert ScoreReply.of([TokenIdsError("empty")]).attributes is None
    assert ScoreReply.of([[0.5]]).outputs() == [[0.5]]


@pytest.mark.parametrize("reason", [Refusal("overloaded", 7), ForwardError("E", "no room")])
def test_a_reply_without_scores_says_why_and_gives_none(reason: Refusal | ForwardError) -> None:
    reply = pickle.loads(pickle.dumps(ScoreReply.without(reason)))
    assert str(reply.refusal or reply.failure) == str(reason)
    assert (reply.refusal is None) != (reply.failure is None)
    with pytest.raises(ValueError, match="there are no scores"):
        reply.outcomes()
