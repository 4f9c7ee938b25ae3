"""The queue and its batches: the oldest first, what shares with it beside it, within the budget; nothing runs here."""

from __future__ import annotations

import math
import random

import pytest

from serve_app.batching.batch_queue import MAX_MISSES, BatchQueue, Request, RequestBatch
from serve_app.reward_model.prefixes import branch_by_prefix


def ids(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(90_000), k=length)


def request(*sequences: list[int], deadline: float = math.inf) -> Request:
    return Request(list(sequences), submitted=0.0, deadline=deadline)


def queue_of(*requests: Request) -> BatchQueue:
    queue = BatchQueue()
    for each in requests:
        queue.add(each)
    return queue


def test_the_oldest_is_always_in_and_others_fill_the_room() -> None:
    large, small, misfit, last = (request(ids(n, length)) for n, length in enumerate((150, 30, 60, 40)))
    queue = queue_of(large, small, misfit, last)
    assert list(queue.plan(100, 0.0).requests) == [large]
    queue.remove(large)
    assert list(queue.plan(100, 0.0).requests) == [small, misfit]
    assert list(queue) == [small, misfit, last]  # a plan takes nothing out


def test_shared_tokens_count_once_within_a_request_and_between_requests() -> None:
    prompt = ids(0, 64)
    batch = RequestBatch(200)
    assert batch.add(request(prompt + ids(1, 10), prompt + ids(2, 10)))
    assert batch.packed_tokens == 84
    assert batch.add(request(prompt + ids(3, 16)))
    assert batch.packed_tokens == 100
    assert batch.num_tokens == 74 + 74 + 80
    assert not batch.add(request(ids(4, 101)))
    assert batch.packed_tokens == 100
    assert batch.add(request(ids(4, 100)))
    assert batch.is_full


def test_the_count_is_that_of_the_engines_plan_in_any_order() -> None:
    """Branches of branches, prefixes and copies, in requests of several; what did not fit leaves nothing behind."""
    chooser = random.Random(4)
    left_out = 0
    for _ in range(40):
        sequences = [ids(chooser.randrange(10**6), 40)]
        while len(sequences) < 24:
            start = chooser.choice(sequences)[: chooser.choice([0, 5, 15, 16, 30, 50, 70])]
            sequences.append(start + ids(chooser.randrange(10**6), chooser.choice([0, 1, 20]) or int(not start)))
        chooser.shuffle(sequences)
        batch = RequestBatch(200)
        for first in range(0, 24, 3):
            batch.add(request(*sequences[first : first + 3]))
        taken = [sequence for each in batch.requests for sequence in each.sequences]
        lengths = list(map(len, taken))
        plan = branch_by_prefix(taken)
        assert batch.packed_tokens == sum(max(1, branch.num_own(lengths)) for branch in plan) <= 200
        left_out += 24 - len(taken)
    assert left_out > 100


def test_what_shares_with_the_batch_comes_before_what_is_older() -> None:
    prompt = ids(0, 64)
    first, older, alike = request(prompt + ids(1, 6)), request(ids(2, 30)), request(prompt + ids(3, 20))
    assert list(queue_of(first, older, alike).plan(100, 0.0).requests) == [first, alike]


def test_a_request_past_its_deadline_stays_behind() -> None:
    late, waiting = request([1], deadline=5.0), request([2], deadline=9.0)
    queue = queue_of(late, waiting)
    assert list(queue.plan(10, 4.9).requests) == [late, waiting]
    assert list(queue.plan(10, 5.0).requests) == [waiting]
    assert not queue.plan(10, 9.0).requests
    assert queue.plan(10, 4.9).has_late(5.0)


def test_a_plan_tries_a_bounded_number_of_misfits() -> None:
    first = request(ids(0, 90))
    misfits = [request(ids(1 + n, 50)) for n in range(MAX_MISSES)]
    fits = request(ids(9999, 10))
    assert list(queue_of(first, *misfits[:-1], fits).plan(100, 0.0).requests) == [first, fits]
    assert list(queue_of(first, *misfits, fits).plan(100, 0.0).requests) == [first]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_what_leaves_the_queue_leaves_no_trace(order: tuple[int, ...]) -> None:
    prompt = ids(0, 40)
    requests = [request(prompt + ids(n, 10), ids(n, 20)) for n in range(3)]
    queue = queue_of(*requests)
    assert queue.num_tokens == 3 * 70
    for place in order:
        queue.remove(requests[place])
        assert requests[place] not in queue
    assert (len(queue), queue.num_tokens, queue._by_prefix) == (0, 0, {})
