"""Parts: every sequence once, candidates together, bounded, and shared out among processes."""

from __future__ import annotations

import random

import pytest

from serve_app.batching.parts import MAX_REPEATS, MIN_PART_TOKENS, conversation_order, cut
from serve_app.reward_model import Conversation, ConversationError
from tests.conftest import chat


def candidates(num_prompts: int, each: int, prompt_tokens: int, own_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Shuffled candidates, and their prompts."""
    chooser = random.Random(num_prompts)
    prompts = [[chooser.randrange(900) for _ in range(prompt_tokens)] for _ in range(num_prompts)]
    made = [
        (prompts[number] + [chooser.randrange(900) for _ in range(own_tokens)], number)
        for number in range(num_prompts)
        for _ in range(each)
    ]
    chooser.shuffle(made)
    return [ids for ids, _ in made], [number for _, number in made]


@pytest.mark.parametrize("max_tokens", [100, 1000, 4096])
@pytest.mark.parametrize("num_processes", [1, 3, 8])
def test_every_sequence_is_in_one_part(max_tokens: int, num_processes: int) -> None:
    sequences, _ = candidates(7, 9, 60, 40)
    parts = cut(sequences, max_tokens=max_tokens, num_processes=num_processes)
    assert sorted(place for part in parts for place in part) == list(range(63))
    assert all(part for part in parts)


def test_candidates_stay_together_and_share_their_prompt_in_the_bound() -> None:
    """4 prompts of 500 tokens with 16 answers of 30: 980 tokens a prompt as the model reads them, not 8,480."""
    sequences, prompts = candidates(4, 16, 500, 30)
    parts = cut(sequences, max_tokens=2000)
    assert [len(part) for part in parts] == [32, 32]
    for part in parts:
        assert len({prompts[place] for place in part}) == 2


def test_a_small_batch_is_shared_by_all_processes() -> None:
    sequences, _ = candidates(16, 4, 100, 50)  # 300 tokens a prompt, 4,800 in all
    parts = cut(sequences, max_tokens=4096, num_processes=4)
    assert [len(part) for part in parts] == [16] * 4
    tiny, _ = candidates(8, 1, 10, 5)
    assert len(cut(tiny, max_tokens=4096, num_processes=4)) == 1
    assert sum(map(len, tiny)) < MIN_PART_TOKENS


def test_what_exceeds_the_bound_is_cut_by_sequences_alone() -> None:
    sequences, _ = candidates(1, 10, 500, 100)
    assert [len(part) for part in cut(sequences, max_tokens=900)] == [4, 4, 2]
    assert cut([[1] * 5000, [2] * 10], max_tokens=900) == [[0], [1]]


def test_nothing_makes_no_part() -> None:
    assert cut([], max_tokens=900, num_processes=2) == []


@pytest.mark.parametrize("num_answers", [40, 2000])
def test_a_long_prompt_with_many_short_answers_is_cut_by_its_tokens_counted_whole(num_answers: int) -> None:
    """So that one part cannot fill a replica's queue, which is bounded in whole tokens."""
    sequences, _ = candidates(1, num_answers, 900, 1)
    parts = cut(sequences, max_tokens=1000)
    assert sorted(place for part in parts for place in part) == list(range(num_answers))
    whole = [sum(len(sequences[place]) for place in part) for part in parts]
    assert max(whole) <= MAX_REPEATS * 1000
    assert len(parts) == -(-num_answers // (MAX_REPEATS * 1000 // 901))


def test_turns_of_a_conversation_count_once_and_stay_together() -> None:
    """8 turns of 100 tokens more each: 810 tokens as the model reads them, not 3,600, each ending in one of its own."""
    spine = list(range(900))
    turns = [[*spine[: 100 * turn], 901] for turn in range(1, 9)]
    others = [[1000 + place] * 300 for place in range(6)]
    parts = cut([*turns[::2], *others[:3], *turns[1::2], *others[3:]], max_tokens=1000)
    assert sorted(parts[0]) == [0, 1, 2, 3, 7, 8, 9, 10]
    assert [len(part) for part in parts] == [8, 3, 3]


def test_conversations_that_begin_alike_stand_together() -> None:
    texts = (("Why?", "So."), ("Who?", "I."), ("Why?", "No."), ("Why?", "So.", "And?", "Yes."), ("Who?", "You."))
    parsed = [Conversation.parse(chat(*each)) for each in texts]
    assert conversation_order(parsed) == [0, 2, 3, 1, 4]
    assert sorted(conversation_order([ConversationError("torn"), *parsed])) == list(range(6))
