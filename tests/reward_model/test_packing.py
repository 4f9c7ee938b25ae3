"""Packing keeps every sequence, in order, under the budget."""

from __future__ import annotations

import random

import torch

from serve_app.reward_model.packing import PackedBatch, pack


def test_runs_cover_every_sequence_in_order_and_keep_the_budget() -> None:
    chooser = random.Random(0)
    for _ in range(100):
        lengths = [chooser.randint(1, 50) for _ in range(chooser.randint(0, 30))]
        runs = list(pack(lengths, 64))
        assert [index for run in runs for index in run] == list(range(len(lengths)))
        for run in runs:
            assert sum(lengths[index] for index in run) <= 64 or len(run) == 1


def test_a_sequence_over_the_budget_runs_alone() -> None:
    assert list(pack([3, 100, 3, 3], 10)) == [range(1), range(1, 2), range(2, 4)]


def test_sequences_lie_end_to_end_and_scores_are_read_at_their_last_tokens() -> None:
    batch = PackedBatch.build([[5, 6, 7], [8]], num_rows=16, device=torch.device("cpu"))
    assert batch.token_ids_T.tolist() == [5, 6, 7, 8] + [0] * 12
    assert batch.starts == [0, 3]
    assert batch.last_rows == [2, 3]
    assert batch.num_tokens == 4
