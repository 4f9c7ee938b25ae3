"""The requests that wait for a model, and which of them run next: plain values, no threads, no clock of its own.

Requests that share prefixes with the oldest one run with it, since the model reads a shared prefix once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, compress, count, zip_longest
from operator import ne

from serve_app.reward_model.prefixes import MIN_SHARED_TOKENS

MAX_MISSES = 128
"""Waiting requests that may turn out not to fit before a batch is taken as full: a plan's cost stays the same however
long the queue is. The oldest request is always in, so one that is passed over gets its turn."""


@dataclass(eq=False, slots=True)
class Request:
    """Sequences of one caller, which run in one batch; two requests are equal only where they are the same one.

    `submitted` and `deadline` are seconds of the batcher's clock. `prefixes` has the hashes of each sequence's first
    16, 32, 64, ... tokens, shortest first; `distinct_prefixes` those of all sequences, longest first. A request that
    `is_withdrawn` has nobody who waits for it any more.
    """

    sequences: list[list[int]]
    submitted: float
    deadline: float
    num_tokens: int = field(init=False)
    prefixes: list[list[int]] = field(init=False)
    distinct_prefixes: list[int] = field(init=False)
    is_withdrawn: bool = False

    def __post_init__(self) -> None:
        self.num_tokens = sum(map(len, self.sequences))
        self.prefixes = [_prefix_hashes(sequence) for sequence in self.sequences]
        levels = reversed(list(zip_longest(*self.prefixes)))
        self.distinct_prefixes = [prefix for prefix in dict.fromkeys(chain(*levels)) if prefix is not None]


class RequestBatch:
    """Requests that run together, of at most `token_budget` tokens, shared prefixes counted once; the first may exceed.

    The count compares a sequence with one other, the first in the batch that has its longest known prefix. So it is at
    least what the best grouping would need, unless that has to leave sharing on several levels unused; the scorer
    splits what then exceeds its budget.
    """

    def __init__(self, token_budget: int) -> None:
        self.token_budget = token_budget
        self.requests: dict[Request, None] = {}
        self.packed_tokens = 0
        self.started = 0.0
        self.left_others = False  # whether requests waited on when it was taken off the queue
        self._sequences: dict[int, list[int]] = {}  # by the hash of a prefix, the first that has it

    @property
    def num_tokens(self) -> int:
        return sum(request.num_tokens for request in self.requests)

    @property
    def is_full(self) -> bool:
        return self.packed_tokens >= self.token_budget

    def has_late(self, now: float) -> bool:
        return any(request.deadline <= now for request in self.requests)

    def add(self, request: Request) -> bool:
        """Take `request` in and return True, if it is the first or fits."""
        own: dict[int, list[int]] = {}
        added = 0
        for sequence, hashes in zip(request.sequences, request.prefixes, strict=True):
            added += len(sequence) - self._num_shared(sequence, hashes, own)
            if self.requests and self.packed_tokens + added > self.token_budget:
                return False
            for prefix in hashes:
                own.setdefault(prefix, sequence)
        self.requests[request] = None
        self.packed_tokens += added
        for prefix, sequence in own.items():
            self._sequences.setdefault(prefix, sequence)
        return True

    def _num_shared(self, sequence: list[int], hashes: list[int], own: dict[int, list[int]]) -> int:
        """Tokens at its start that `sequence` has in common with the one that has its longest known prefix.

        Who has a prefix has all shorter ones: the search ends at the first that nobody has.
        """
        nearest = None
        for prefix in hashes:
            other = self._sequences.get(prefix) or own.get(prefix)
            if other is None:
                break
            nearest = other
        return 0 if nearest is None else _common_prefix(sequence, nearest)


class BatchQueue:
    """Requests that wait, the longest-waiting first, and which of them begin alike."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_sequences = 0
        self._requests: OrderedDict[Request, None] = OrderedDict()
        self._by_prefix: dict[int, dict[Request, None]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: Request) -> bool:
        return request in self._requests

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        self._requests[request] = None
        self.num_tokens += request.num_tokens
        self.num_sequences += len(request.sequences)
        for prefix in request.distinct_prefixes:
            self._by_prefix.setdefault(prefix, {})[request] = None

    def remove(self, request: Request) -> None:
        del self._requests[request]
        self.num_tokens -= request.num_tokens
        self.num_sequences -= len(request.sequences)
        for prefix in request.distinct_prefixes:
            alike = self._by_prefix[prefix]
            del alike[request]
            if not alike:
                del self._by_prefix[prefix]

    def plan(self, token_budget: int, now: float) -> RequestBatch:
        """A batch with the oldest request, filled with what fits; requests past their deadline stay behind."""
        batch = RequestBatch(token_budget)
        tried: set[Request] = set()
        misses = 0
        for request in self._in_turn(batch):
            if request in tried or request.deadline <= now:
                continue
            tried.add(request)
            misses += not batch.add(request)
            if batch.is_full or misses == MAX_MISSES:
                break
        return batch

    def _in_turn(self, batch: RequestBatch) -> Iterator[Request]:
        """Requests in waiting order; after one that was taken into `batch`, those that share most with it."""
        walked: set[int] = set()
        for request in self._requests:
            yield request
            if request in batch.requests:
                prefixes = [prefix for prefix in request.distinct_prefixes if prefix not in walked]
                walked.update(prefixes)
                for prefix in prefixes:
                    yield from self._by_prefix[prefix]


def _prefix_hashes(sequence: list[int]) -> list[int]:
    """Hashes of the first 16, 32, 64, ... tokens, as far as one token is left, as sharing needs."""
    tokens = tuple(sequence)
    hashes = []
    length = MIN_SHARED_TOKENS
    while length < len(tokens):
        hashes.append(hash(tokens[:length]))
        length *= 2
    return hashes


def _common_prefix(first: list[int], second: list[int]) -> int:
    """Tokens the two share at their start, less than the length of either; 0 where that is too few to share.

    Hashes may collide, so nothing is taken from their being equal.
    """
    shortest = min(len(first), len(second)) - 1
    shared = next(compress(count(), map(ne, first, second)), shortest)
    return min(shared, shortest) if shared >= MIN_SHARED_TOKENS else 0
