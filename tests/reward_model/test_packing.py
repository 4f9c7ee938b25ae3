"""Packing keeps every sequence, in order, under the budget, and reads again what costs least."""

from __future__ import annotations

import random

import torch

from serve_app.reward_model.packing import BRANCHES_OVER_BUDGET, PackedBatch, Read, Span, halves, num_rows, pack
from serve_app.reward_model.prefixes import Branch, branch_by_prefix


def lone(count: int) -> list[Branch]:
    return [Branch(index) for index in range(count)]


def fan(num_shared: int, first: int, count: int) -> list[Branch]:
    """A spine and branches that all depart from it at one place."""
    return [Branch(first + place, num_shared if place else 0) for place in range(count)]


def members(batch: list[Branch]) -> list[int]:
    return [branch.sequence for branch in batch]


def random_plan(chooser: random.Random) -> tuple[list[Branch], list[list[int]]]:
    sequences = [[chooser.randrange(9) for _ in range(30)]]
    for _ in range(chooser.randint(0, 20)):
        start = chooser.choice(sequences)[: chooser.choice([0, 16, 30, 40])]
        sequences.append([*start, *(chooser.randrange(9) for _ in range(chooser.randint(0 if start else 1, 40)))])
    return branch_by_prefix(sequences), sequences


def test_batches_cover_every_sequence_in_order_and_keep_the_budget() -> None:
    chooser = random.Random(0)
    for _ in range(300):
        plan, sequences = random_plan(chooser)
        lengths = [len(sequence) for sequence in sequences]
        batches = list(pack(plan, lengths, lambda: 64))
        assert [member for batch in batches for member in members(batch)] == members(plan)
        for batch in batches:
            spine = lengths[batch[0].sequence]
            assert batch[0].num_shared == 0
            assert num_rows(batch, lengths) <= 64 or num_rows(batch, lengths) <= spine * (1 + BRANCHES_OVER_BUDGET)


def test_a_sequence_over_the_budget_runs_alone() -> None:
    assert [members(batch) for batch in pack(lone(4), [3, 100, 3, 3], lambda: 10)] == [[0], [1], [2, 3]]


def test_a_sequence_over_the_budget_takes_what_adds_little_along() -> None:
    """Reads in its middle and branches of a token; a branch that would need more memory has a batch of its own."""
    turns = [Branch(0), Branch(1, 900), Branch(2, 700), Branch(3, 500), Branch(4, 300)]
    lengths = [1000, 901, 700, 501, 800]
    assert list(pack(turns, lengths, lambda: 400)) == [turns[:4], [Branch(4)]]
    assert list(pack(turns[:4], lengths, lambda: 1001)) == [turns[:4]]


def test_candidates_over_the_budget_repeat_only_their_prompt() -> None:
    batches = list(pack(fan(20, 0, 4), [30] * 4, lambda: 45))
    assert batches == [fan(20, 0, 2), fan(20, 2, 2)]


def test_candidates_that_fit_a_batch_of_their_own_are_not_split() -> None:
    batches = list(pack([*lone(1), *fan(20, 1, 2)], [30, 30, 30], lambda: 45))
    assert batches == [lone(1), fan(20, 1, 2)]


def test_batches_end_where_least_is_read_again() -> None:
    """Two prompts with 10 tokens in common: the second prompt's branches stay together."""
    plan = [Branch(0), Branch(1, 300), Branch(2, 300), Branch(3, 20), Branch(4, 300), Branch(5, 300)]
    assert list(pack(plan, [320] * 6, lambda: 690)) == [plan[:3], [Branch(3), *plan[4:]]]


def test_empty_rows_cost_too() -> None:
    """A batch of a few tokens is not worth a branch that shares a little more."""
    plan = [Branch(0), Branch(1, 16), *(Branch(place, 17) for place in range(2, 100))]
    batches = list(pack(plan, [1000] * 100, lambda: 50_000))
    assert len(batches) == 2
    assert len(batches[0]) > 40


def test_branches_without_tokens_count_as_rows() -> None:
    plan = [Branch(0), *(Branch(place, 20) for place in range(1, 200))]
    batches = list(pack(plan, [20] * 200, lambda: 100))
    assert [len(batch) for batch in batches] == [81, 81, 38]


def test_copied_keys_count_where_sequences_share() -> None:
    plan = fan(2000, 0, 1000)
    lengths = [2050] * 1000
    batches = list(pack(plan, lengths, lambda: 20_000, rows_per_key=0.1))
    assert len(batches[0]) == (20_000 - 2000) // (50 + 205)
    assert list(pack(lone(20), [1000] * 20, lambda: 20_000, rows_per_key=0.1)) == [lone(20)]


def test_halves_hold_the_same_sequences() -> None:
    chooser = random.Random(1)
    for _ in range(200):
        plan, _ = random_plan(chooser)
        first, second = halves(plan)
        assert members(first) + members(second) == members(plan)
        assert len(first) == len(plan) // 2
        assert second[0].num_shared == 0


def test_branches_keep_their_positions_and_reads_find_their_rows() -> None:
    sequences = [[5, 6, 7, 8], [5, 6], [5, 6, 7, 9, 3], [5, 6, 2], [4]]
    plan = [Branch(0), Branch(2, 3), Branch(3, 2), Branch(1, 2), Branch(4)]
    batch = PackedBatch.build(sequences, plan, padded=lambda count: 16, device=torch.device("cpu"))
    assert batch.token_ids_T.tolist() == [5, 6, 7, 8, 9, 3, 2, 4] + [4] * 8
    assert batch.spans == [Span(0, 4), Span(4, 2, 3), Span(6, 1, 2), Span(7, 1)]
    assert batch.reads == [Read(0, 4, 3), Read(1, 5, 5), Read(2, 3, 6), Read(2, 2, 1), Read(3, 1, 7)]
    assert (batch.members, batch.num_tokens, batch.shares) == ([0, 2, 3, 1, 4], 8, True)
    assert [path.tolist() for path in batch.paths()] == [[0, 1, 2, 3], [0, 1, 2, 4, 5], [0, 1, 6], [7]]


def test_every_path_holds_its_sequence() -> None:
    chooser = random.Random(2)
    for _ in range(100):
        plan, sequences = random_plan(chooser)
        batch = PackedBatch.build(
            sequences,
            plan,
            padded=lambda count: 999,
            device=torch.device("cpu"),
            read_positions=lambda ids: (len(ids) // 2, len(ids) - 1),
        )
        paths = batch.paths()
        for place, member in enumerate(batch.members):
            middle = batch.reads[2 * place]
            ids = sequences[member]
            assert batch.token_ids_T[paths[middle.span]][: len(ids)].tolist() == ids
            assert middle.row == paths[middle.span][len(ids) // 2]
            assert middle.num_keys == len(ids) // 2 + 1
