"""The requests that wait for a model, and which of them run next: plain values, no threads, no clock of its own.

Requests that share prefixes with the oldest one run with it, since the model reads a shared prefix once. What a batch
costs is what the engine's own plan reads of it: spines and branches at any depth.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest

from serve_app.reward_model.prefixes import MIN_SHARED_TOKENS, num_rows, sort_key

MAX_MISSES = 128
"""Waiting requests that may turn out not to fit before a batch is taken as full: a plan's cost stays the same however
long the queue is. The oldest request is always in, so one that is passed over gets its turn."""


@dataclass(eq=False, slots=True)
class Request:
    """Sequences of one caller, which run in one batch; two requests are equal only where they are the same one.

    `submitted` and `deadline` are seconds of the batcher's clock. `prefixes` has the hashes of each sequence's first
    16, 32, 64, ... tokens, shortest first; `distinct_prefixes` those of all sequences, longest first. `keys` sort the
    sequences as the engine's plan does. A request that `is_withdrawn` has nobody who waits for it any more.
    """

    sequences: list[list[int]]
    submitted: float
    deadline: float
    num_tokens: int = field(init=False)
    keys: list[bytes] = field(init=False)
    distinct_prefixes: list[int] = field(init=False)
    is_withdrawn: bool = False

    def __post_init__(self) -> None:
        self.num_tokens = sum(map(len, self.sequences))
        self.keys = [_key(sequence) for sequence in self.sequences]
        levels = reversed(list(zip_longest(*map(_prefix_hashes, self.sequences))))
        self.distinct_prefixes = [prefix for prefix in dict.fromkeys(chain(*levels)) if prefix is not None]


class RequestBatch:
    """Requests that run together, of at most `token_budget` tokens, shared prefixes counted once; the first may exceed.

    The count is that of the engine's plan, whatever the order in which requests come. The scorer splits what exceeds
    its budget all the same.
    """

    def __init__(self, token_budget: int) -> None:
        self.token_budget = token_budget
        self.requests: dict[Request, None] = {}
        self.packed_tokens = 0
        self.started = 0.0
        self.left_others = False  # whether requests waited on when it was taken off the queue
        self._keys: list[bytes] = []  # of the requests' sequences, in order

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
        added = 0
        for count, key in enumerate(request.keys):
            place = bisect_left(self._keys, key)
            added += self._added(key, place)
            if self.requests and self.packed_tokens + added > self.token_budget:
                for inserted in request.keys[:count]:
                    del self._keys[bisect_left(self._keys, inserted)]
                return False
            self._keys.insert(place, key)
        self.requests[request] = None
        self.packed_tokens += added
        return True

    def _added(self, key: bytes, place: int) -> int:
        """Rows that a plan has more with a sequence at `place`, between two that stood together."""
        before = self._keys[place] if place < len(self._keys) else b""
        added = num_rows(before, key)
        if place:
            behind = self._keys[place - 1]
            added += num_rows(key, behind) - num_rows(before, behind)
        return added


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


def _key(sequence: list[int]) -> bytes:
    """The sequence's key; an empty one where it holds what no token id is, since the scorer refuses it then."""
    try:
        return sort_key(sequence)
    except (OverflowError, TypeError, ValueError):
        return b""


def _prefix_hashes(sequence: list[int]) -> list[int]:
    """Hashes of the first 16, 32, 64, ... tokens, as far as one token is left, as sharing needs."""
    tokens = tuple(sequence)
    hashes = []
    length = MIN_SHARED_TOKENS
    while length < len(tokens):
        hashes.append(hash(tokens[:length]))
        length *= 2
    return hashes
