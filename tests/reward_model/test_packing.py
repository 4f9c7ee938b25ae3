"""Packing keeps every sequence, in order, under the budget, and repeats no more than shared tokens."""

from __future__ import annotations

import random

import torch

from serve_app.reward_model.packing import PackedBatch, Span, halves, pack
from serve_app.reward_model.prefixes import Group


def lone(count: int) -> list[Group]:
    return [Group(0, (index,)) for index in range(count)]


def members(batch: list[Group]) -> list[int]:
    return [member for group in batch for member in group.members]


def random_groups(chooser: random.Random) -> tuple[list[Group], list[int]]:
    groups: list[Group] = []
    lengths: list[int] = []
    for _ in range(chooser.randint(0, 12)):
        shared = chooser.choice([0, 16, 30])
        count = chooser.randint(2, 9) if shared else 1
        groups.append(Group(shared, tuple(range(len(lengths), len(lengths) + count))))
        lengths += [shared + chooser.randint(1, 40) for _ in range(count)]
    return groups, lengths


def test_batches_cover_every_sequence_in_order_and_keep_the_budget() -> None:
    chooser = random.Random(0)
    for _ in range(200):
        groups, lengths = random_groups(chooser)
        batches = list(pack(groups, lengths, lambda: 64))
        assert [member for batch in batches for member in members(batch)] == list(range(len(lengths)))
        for batch in batches:
            assert sum(group.num_rows(lengths) for group in batch) <= 64 or len(members(batch)) == 1


def test_a_sequence_over_the_budget_runs_alone() -> None:
    assert [members(batch) for batch in pack(lone(4), [3, 100, 3, 3], lambda: 10)] == [[0], [1], [2, 3]]


def test_a_group_over_the_budget_repeats_only_its_shared_tokens() -> None:
    batches = list(pack([Group(20, (0, 1, 2, 3))], [30] * 4, lambda: 45))
    assert batches == [[Group(20, (0, 1))], [Group(20, (2, 3))]]


def test_a_group_that_fits_a_batch_of_its_own_is_not_split() -> None:
    batches = list(pack([*lone(1), Group(20, (1, 2))], [30, 30, 30], lambda: 45))
    assert batches == [[Group(0, (0,))], [Group(20, (1, 2))]]


def test_halves_hold_the_same_sequences() -> None:
    chooser = random.Random(1)
    for _ in range(200):
        groups, lengths = random_groups(chooser)
        first, second = halves(groups)
        assert members(first) + members(second) == list(range(len(lengths)))
        assert len(members(first)) == len(lengths) // 2


def test_a_trunk_stands_before_its_leaves_which_keep_their_positions() -> None:
    sequences = [[5, 6, 7], [5, 6, 8, 9], [4]]
    groups = [Group(2, (0, 1)), Group(0, (2,))]
    batch = PackedBatch.build(sequences, groups, num_rows=16, device=torch.device("cpu"))
    trunk = Span(0, 2, is_scored=False)
    assert batch.token_ids_T.tolist() == [5, 6, 7, 8, 9, 4] + [4] * 10
    assert batch.spans == [trunk, Span(2, 1, 2, trunk), Span(3, 2, 2, trunk), Span(5, 1)]
    assert [span.num_keys for span in batch.spans] == [2, 3, 4, 1]
    assert (batch.members, batch.num_tokens) == ([0, 1, 2], 6)
    assert batch.scored == batch.spans[1:]
