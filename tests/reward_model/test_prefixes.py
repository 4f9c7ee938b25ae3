"""Common prefixes are found in any order, in time linear in tokens, and shared where that saves most."""

from __future__ import annotations

import random
import time
from itertools import combinations

import pytest

from serve_app.reward_model.prefixes import MIN_SHARED_TOKENS, Group, group_by_prefix, together


def ids(seed: int, length: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(90_000) for _ in range(length)]


def saved(groups: list[Group]) -> int:
    return sum(group.num_shared * (len(group.members) - 1) for group in groups)


def test_candidates_of_each_prompt_share_it_wherever_they_stand() -> None:
    prompts = [ids(seed, 100) for seed in range(3)]
    sequences = [prompts[place % 3] + ids(100 + place, 20) for place in range(12)]
    assert group_by_prefix(sequences) == [Group(100, tuple(range(first, 12, 3))) for first in range(3)]


def test_sequences_with_little_in_common_stand_alone() -> None:
    short = ids(0, MIN_SHARED_TOKENS - 1)
    sequences = [short + ids(seed, 30) for seed in range(1, 5)]
    assert group_by_prefix(sequences) == [Group(0, (place,)) for place in range(4)]


def test_a_member_keeps_a_token_of_its_own() -> None:
    """Also where one is the beginning of another, or the same."""
    long = ids(0, 50)
    assert group_by_prefix([long, long[:30], long, ids(1, 9)]) == [Group(29, (0, 1, 2)), Group(0, (3,))]


def test_long_prompts_win_over_a_system_prompt_that_all_share() -> None:
    system = ids(0, 20)
    prompts = [system + ids(seed, 200) for seed in range(1, 4)]
    sequences = [prompt + ids(50 + place, 10) for place, prompt in enumerate(prompts * 3)]
    assert [group.num_shared for group in group_by_prefix(sequences)] == [220, 220, 220]


def test_a_system_prompt_is_shared_where_nothing_else_is() -> None:
    system = ids(0, 40)
    sequences = [system + ids(seed, 30) for seed in range(1, 6)]
    assert group_by_prefix(sequences) == [Group(40, (0, 1, 2, 3, 4))]


def test_turns_that_grow_share_one_level() -> None:
    whole = ids(0, 300)
    groups = group_by_prefix([whole[:end] for end in (60, 120, 180, 240, 300)])
    assert sorted(member for group in groups for member in group.members) == list(range(5))
    assert saved(groups) >= 239 + 119


def test_sequences_with_angles_of_their_own_share_nothing() -> None:
    prompt = ids(0, 100)
    sequences = [prompt + ids(seed, 50) for seed in range(1, 4)] + [prompt + ids(9, 400)]
    assert group_by_prefix(sequences, longest=300) == [Group(100, (0, 1, 2)), Group(0, (3,))]


def test_the_partition_saves_nearly_as_much_as_the_best() -> None:
    """Against every partition of few sequences."""
    chooser = random.Random(5)
    for _ in range(60):
        stems = [ids(0, 40)]
        for _ in range(3):
            stems.append(chooser.choice(stems)[: chooser.randint(16, 40)] + ids(chooser.randrange(10**6), 30))
        sequences = [chooser.choice(stems) + ids(chooser.randrange(10**6), 5) for _ in range(6)]
        assert saved(group_by_prefix(sequences)) >= 0.8 * best_saving(sequences)


def best_saving(sequences: list[list[int]]) -> int:
    """The most that any partition saves, by trying all of them."""

    def shared(members: tuple[int, ...]) -> int:
        first, last = min(sequences[member] for member in members), max(sequences[member] for member in members)
        common = next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), 0)
        return common if common >= MIN_SHARED_TOKENS else 0

    def best(left: tuple[int, ...]) -> int:
        if not left:
            return 0
        head, rest = left[0], left[1:]
        choices = (members for size in range(len(rest) + 1) for members in combinations(rest, size))
        return max(
            len(members) * shared((head, *members)) + best(tuple(place for place in rest if place not in members))
            for members in choices
        )

    return best(tuple(range(len(sequences))))


@pytest.mark.parametrize("kind", ["apart", "nested", "same"])
def test_a_hundred_thousand_sequences_are_planned_in_seconds(kind: str) -> None:
    if kind == "apart":
        sequences = [ids(seed, 32) for seed in range(100_000)]
    elif kind == "same":
        sequences = [ids(0, 32)] * 100_000
    else:
        whole = ids(0, 2000)
        sequences = [whole[: 20 + seed % 1980] for seed in range(100_000)]
        sequences = sequences[:5000]
    started = time.thread_time()
    groups = group_by_prefix(sequences)
    assert time.thread_time() - started < 10  # quadratic time would be hours
    assert sum(len(group.members) for group in groups) == len(sequences)


def test_nothing_has_no_groups() -> None:
    assert group_by_prefix([]) == []


def test_equal_keys_come_together_in_order_of_appearance() -> None:
    assert together(6, "abcabd".__getitem__) == [0, 3, 1, 4, 2, 5]
