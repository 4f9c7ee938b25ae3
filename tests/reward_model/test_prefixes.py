"""Every prefix is read once, at any depth and in any order, in time linear in tokens."""

from __future__ import annotations

import random
import time

import pytest

from serve_app.reward_model.prefixes import MIN_SHARED_TOKENS, Branch, branch_by_prefix, in_tree_order, together


def ids(seed: int, length: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(90_000) for _ in range(length)]


def tokens_read(plan: list[Branch], sequences: list[list[int]]) -> int:
    return sum(branch.num_own([len(sequence) for sequence in sequences]) for branch in plan)


def num_prefixes(sequences: list[list[int]]) -> int:
    """Distinct beginnings, the whole sequences among them: nobody reads less."""
    return len({tuple(sequence[: end + 1]) for sequence in sequences for end in range(len(sequence))})


def grown(chooser: random.Random, count: int) -> list[list[int]]:
    """Sequences that begin as others do, at any depth, some of them prefixes or copies of others."""
    sequences = [ids(chooser.randrange(10**6), 40)]
    while len(sequences) < count:
        start = chooser.choice(sequences)[: chooser.randint(MIN_SHARED_TOKENS, 60)]
        sequences.append(start + ids(chooser.randrange(10**6), chooser.choice([0, 0, 1, 5, 30])))
    chooser.shuffle(sequences)
    return sequences


def test_candidates_of_each_prompt_share_it_wherever_they_stand() -> None:
    prompts = [ids(seed, 100) for seed in range(3)]
    sequences = [prompts[place % 3] + ids(100 + place, 20) for place in range(12)]
    plan = branch_by_prefix(sequences)
    assert [branch.num_shared for branch in plan] == [0, 100, 100, 100] * 3
    assert [branch.sequence % 3 for branch in plan] == [0] * 4 + [1] * 4 + [2] * 4


def test_sequences_with_little_in_common_stand_alone_in_their_order() -> None:
    short = ids(0, MIN_SHARED_TOKENS - 1)
    sequences = [short + ids(seed, 30) for seed in range(1, 5)]
    assert branch_by_prefix(sequences) == [Branch(place) for place in range(4)]


def test_a_prefix_and_a_copy_cost_nothing_however_short() -> None:
    long = ids(0, 50)
    plan = branch_by_prefix([long[:3], long, long[:30], long, ids(1, 9)])
    assert plan == [Branch(1), Branch(3, 50), Branch(2, 30), Branch(0, 3), Branch(4)]


def test_turns_that_grow_are_read_once() -> None:
    """A token behind every turn, as where a reward token ends what is scored: the longest is the spine or one token."""
    whole = ids(0, 300)
    turns = [[*whole[:end], 90_001] for end in (60, 120, 180, 240, 300)]
    plan = branch_by_prefix(turns)
    assert tokens_read(plan, turns) == 305
    assert sorted(branch.num_shared for branch in plan) == [0, 60, 120, 180, 240]


def test_system_prompt_prompts_and_answers_are_shared_each_at_its_depth() -> None:
    system = ids(0, 20)
    prompts = [system + ids(seed, 200) for seed in range(1, 4)]
    sequences = [prompt + ids(50 + place, 10) for place, prompt in enumerate(prompts * 3)]
    assert tokens_read(branch_by_prefix(sequences), sequences) == 20 + 3 * 200 + 9 * 10


def test_a_branch_comes_before_those_that_depart_nearer_to_the_start() -> None:
    whole = ids(0, 100)
    sequences = [whole[:end] + ids(end, 5) for end in (20, 80, 40, 60)] + [whole]
    departures = [branch.num_shared for branch in branch_by_prefix(sequences)]
    assert sorted(departures) == [0, 20, 40, 60, 80]
    chooser = random.Random(3)
    for _ in range(50):
        sequences = grown(chooser, 20)
        path: list[int] = []
        for branch in branch_by_prefix(sequences):
            assert path[: branch.num_shared] == sequences[branch.sequence][: branch.num_shared]
            path[branch.num_shared :] = sequences[branch.sequence][branch.num_shared :]


def test_no_plan_reads_less() -> None:
    chooser = random.Random(5)
    for _ in range(60):
        sequences = grown(chooser, 12)
        plan = branch_by_prefix(sequences)
        assert sorted(branch.sequence for branch in plan) == list(range(12))
        assert tokens_read(plan, sequences) == num_prefixes(sequences)


def test_sequences_with_angles_of_their_own_share_nothing() -> None:
    """Neither they nor, by way of one that sorts between them, do others share less."""
    prompt = ids(0, 100)
    own = [[1, *ids(1, 50)], [3, *ids(3, 50)], [2, *ids(9, 400)], [2, *ids(9, 400)]]
    sequences = [prompt + tokens for tokens in own]
    plan = branch_by_prefix(sequences, longest=300)
    assert plan == [Branch(1), Branch(0, 100), Branch(2), Branch(3)]


@pytest.mark.parametrize("kind", ["apart", "nested", "same", "turns", "one system prompt"])
def test_a_hundred_thousand_sequences_are_planned_in_seconds(kind: str) -> None:
    if kind == "apart":
        sequences = [ids(seed, 32) for seed in range(100_000)]
    elif kind == "same":
        sequences = [ids(0, 32)] * 100_000
    elif kind == "turns":
        sequences = [[*ids(seed // 8, 64)[: 8 * (1 + seed % 8)], 5] for seed in range(100_000)]
    elif kind == "nested":
        whole = ids(0, 2000)
        sequences = [whole[: 20 + seed % 1980] for seed in range(5000)]
    else:
        sequences = [ids(0, 30) + ids(seed, 2) for seed in range(100_000)]
    started = time.thread_time()
    plan = branch_by_prefix(sequences)
    assert time.thread_time() - started < 6  # 3 where nobody else is; quadratic time would be hours
    assert sorted(branch.sequence for branch in plan) == list(range(len(sequences)))


def test_nothing_has_no_plan() -> None:
    assert branch_by_prefix([]) == []


def test_equal_keys_come_together_in_order_of_appearance() -> None:
    assert together(6, "abcabd".__getitem__) == [0, 3, 1, 4, 2, 5]


def test_paths_with_a_common_beginning_come_together_at_every_level() -> None:
    paths = ["xy", "a", "abc", "xz", "ab", "", "abd", "ab", "xyz"]
    assert [paths[place] for place in in_tree_order(paths)] == ["", "xy", "xyz", "xz", "a", "ab", "ab", "abc", "abd"]
    assert in_tree_order(["ab", "ab", "ab"]) == [0, 1, 2]
