"""Token-id sequences -> scores: grouped by prefix, packed and run; out of memory and not finite are met here."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from serve_app.reward_model.decoder import Decoder
from serve_app.reward_model.errors import (
    DeviceError,
    DeviceMemoryError,
    NonFiniteScoreError,
    ScoringError,
    TokenIdsError,
)
from serve_app.reward_model.packing import halves, num_rows, pack
from serve_app.reward_model.prefix_cache import CACHE_BLOCK_TOKENS, CacheBytes, CachedPass, PrefixCache, cache_bytes
from serve_app.reward_model.prefixes import Branch, branch_by_prefix
from serve_app.reward_model.processor import processor_of
from serve_app.reward_model.scores import Outputs
from serve_app.reward_model.token_budget import (
    CPU_TOKEN_BUDGET,
    TRIAL_TOKENS,
    BudgetRecovery,
    available_bytes,
    budget_for,
    cut_for_devices,
    waiting_bytes,
)

logger = logging.getLogger(__name__)


class SequenceMemory(Protocol):
    """What remembers the outputs of sequences."""

    def outputs(
        self,
        sequences: Sequence[Sequence[int]],
        compute: Callable[[Sequence[Sequence[int]]], list[Outputs | ScoringError]],
    ) -> list[Outputs | ScoringError]:
        """The outputs of each sequence, in order; of those that it does not know they are computed."""
        ...


class SequenceScorer:
    """Runs a decoder over any number of sequences. Calls from several threads take turns.

    `token_budget` is how many tokens one forward pass reads at most, shared ones once; a longer sequence runs alone.
    Where memory lacks it is lowered, and comes back when it is enough again. `memory_share` is how much of each card
    this process was given. `share_prompts` may be turned off for measurements: the scores keep their bits. With a
    `prefix_cache`, no prefix is read again that an earlier call had; a `memory` is asked before anything is computed.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        token_budget: int | Literal["auto"],
        prefix_cache_bytes: CacheBytes = 0,
        memory_share: float = 1.0,
    ) -> None:
        if token_budget != "auto" and (not isinstance(token_budget, int) or token_budget < 1):
            raise ValueError(f"token_budget is 'auto' or a positive whole number of tokens, not {token_budget!r}")
        self.share_prompts = True
        self.decoder = decoder
        self._lock = threading.Lock()
        self._memory_share = memory_share
        self._recovery = BudgetRecovery()
        self._is_measured = token_budget == "auto" and decoder.device.type == "cuda"
        self.token_budget = CPU_TOKEN_BUDGET if token_budget == "auto" else token_budget
        self.prefix_cache = _cache(decoder, prefix_cache_bytes)
        self.memory: SequenceMemory | None = None
        self._given_up_tokens = 0
        self.measure_budget()

    def measure_budget(self) -> None:
        """Find the token budget anew, where it is "auto" and on CUDA: what others hold of the cards may have changed.

        Raises:
            DeviceError: the weights alone take what this process was given of a card.
        """
        if self._is_measured:
            with self._lock:
                self.token_budget = _measured_budget(self.decoder, self._memory_share)

    @property
    def processor(self) -> str:
        """The kind of processor that it computes on, as `processor.py` has it."""
        return processor_of(self.decoder.device)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values came from the prefix cache so far."""
        cache = self.prefix_cache  # another thread may give it up
        return self._given_up_tokens + (0 if cache is None else cache.num_read)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float | ScoringError]:
        """The score of each sequence, in order, or the error that it alone has.

        Each is read where `DecoderConfig.num_read` says; the tokens behind that place are not computed.
        """
        return [item if isinstance(item, ScoringError) else item[0] for item in self.outputs(sequences)]

    def outputs(self, sequences: Sequence[Sequence[int]]) -> list[Outputs | ScoringError]:
        """Like `score`, with the attributes behind each score where the model has any."""
        return self._computed(sequences) if self.memory is None else self.memory.outputs(sequences, self._computed)

    def _computed(self, sequences: Sequence[Sequence[int]]) -> list[Outputs | ScoringError]:
        checked = [self._check(sequence) for sequence in sequences]
        values: dict[int, Outputs | ScoringError] = {
            index: error for index, error in enumerate(checked) if error is not None
        }
        able = [index for index, error in enumerate(checked) if error is None]
        sequences = [self._read_part(sequence) for sequence in sequences]
        lengths = [len(sequence) for sequence in sequences]
        branches = self._branches(sequences, able)
        rows_per_key = self.decoder.rows_per_key
        num_devices, total_rows = len(self.decoder.devices), num_rows(branches, lengths)
        with self._lock:
            branches = self._with_cached(branches, sequences)
            under_way: deque[_Started] = deque()
            for batch in pack(
                branches,
                lengths,
                lambda: cut_for_devices(self.token_budget, total_rows, num_devices),
                rows_per_key=rows_per_key,
            ):
                under_way.append(self._start(batch, sequences))
                if len(under_way) > num_devices:  # each device has a batch then, and the first one its next
                    values |= self._finish(under_way.popleft(), sequences)
            for started in under_way:
                values |= self._finish(started, sequences)
        return [values[index] for index in range(len(sequences))]

    def _check(self, sequence: Sequence[int]) -> TokenIdsError | None:
        """What keeps a sequence from being scored: an id outside the vocabulary would end a whole CUDA process."""
        config = self.decoder.config
        if not sequence:
            return TokenIdsError("the sequence is empty")
        if len(sequence) > config.max_tokens:
            return TokenIdsError(f"the sequence has {len(sequence)} tokens, the limit is {config.max_tokens}")
        if set(map(type, sequence)) != {int}:
            return TokenIdsError("token ids are integers, in one list per sequence")
        wrong = min(sequence) if min(sequence) < 0 else max(sequence)
        if not 0 <= wrong < config.vocab_size:
            return TokenIdsError(f"token id {wrong} is outside the vocabulary of {config.vocab_size}")
        try:
            self.decoder.head.read_positions(self._read_part(sequence))
        except TokenIdsError as error:
            return error
        return None

    def _read_part(self, sequence: Sequence[int]) -> Sequence[int]:
        """The sequence up to where its score is read."""
        num_read = self.decoder.config.num_read(sequence)
        return sequence if num_read == len(sequence) else sequence[:num_read]

    def _branches(self, sequences: Sequence[Sequence[int]], able: list[int]) -> list[Branch]:
        """The plan of the sequences numbered in `able`."""
        if not self.share_prompts:
            return [Branch(index) for index in able]
        longest = self.decoder.config.longest_unstretched
        plan = branch_by_prefix([sequences[index] for index in able], longest=longest)
        return [Branch(able[branch.sequence], branch.num_shared) for branch in plan]

    def _with_cached(self, branches: list[Branch], sequences: Sequence[Sequence[int]]) -> list[Branch]:
        """The plan of a call, with what the cache has of each sequence before the first place where it is read."""
        cache = self._cache_in_use
        if cache is None:
            return branches
        cache.begin_call()
        found = [cache.find(one := sequences[branch.sequence], self.decoder.first_read(one)) for branch in branches]
        return [replace(branch, num_cached=tokens) for branch, tokens in zip(branches, found, strict=True)]

    @property
    def _cache_in_use(self) -> PrefixCache | None:
        return self.prefix_cache if self.share_prompts else None

    def _start(self, branches: list[Branch], sequences: Sequence[Sequence[int]]) -> _Started:
        """Launch one forward pass. On CUDA the next one is prepared while this one runs."""
        cache = self._cache_in_use
        if cache is None and any(branch.num_cached for branch in branches):  # it was given up after that was planned
            branches = [replace(branch, num_cached=0) for branch in branches]
        try:
            scores = _HostCopy.of(self.decoder.score(sequences, branches, cache=cache))
            return _Started(branches, scores, self.decoder.cached_pass)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            return _Started(branches, str(error), self.decoder.cached_pass)

    def _finish(self, started: _Started, sequences: Sequence[Sequence[int]]) -> dict[int, Outputs | ScoringError]:
        """The scores of a pass that was started; where memory lacked, of two of half the size."""
        branches = started.branches
        members = [branch.sequence for branch in branches]
        num_tokens = sum(len(sequences[branch.sequence]) - branch.num_known for branch in branches)
        if isinstance(started.scores, _HostCopy):
            found = started.scores.wait()
            finite = np.isfinite(found).all(axis=1)
            started.settle(is_sound=bool(finite.all()))
            self._fitted(num_tokens)
            values: dict[int, Outputs | ScoringError] = dict(zip(members, found, strict=True))
            for place in np.flatnonzero(~finite):
                member = members[place]
                values[member] = self._alone(found[place], sequences, branches, member)
            return values
        started.settle(is_sound=False)
        self._release_memory()
        if self.prefix_cache is not None:
            self._give_up_cache()
            return self._score_batch(sequences, branches)
        if len(members) == 1:
            return {members[0]: DeviceMemoryError(f"{num_tokens} tokens do not fit in memory: {started.scores}")}
        before = self.token_budget
        self.token_budget = max(1, min(before, num_tokens // 2))  # those under way were as large
        self._recovery.lowered(before, self.token_budget)
        logger.warning("out of memory with %d tokens; the token budget is now %d", num_tokens, self.token_budget)
        first, second = halves(branches)
        return self._score_batch(sequences, first) | self._score_batch(sequences, second)

    def _fitted(self, num_tokens: int) -> None:
        budget = self._recovery.after_pass(self.token_budget, num_tokens)
        if budget != self.token_budget:
            logger.info("the token budget is %d again, after %d", budget, self.token_budget)
            self.token_budget = budget

    def _score_batch(
        self, sequences: Sequence[Sequence[int]], branches: list[Branch]
    ) -> dict[int, Outputs | ScoringError]:
        return self._finish(self._start(branches, sequences), sequences)

    def _alone(
        self, outputs: Outputs, sequences: Sequence[Sequence[int]], branches: list[Branch], member: int
    ) -> Outputs | ScoringError:
        """What a sequence has alone whose `outputs` are not finite: another's infinities can reach its attention."""
        alone = [Branch(member)]
        self.decoder.release_buffers()  # else they could reach those of later batches, too
        if branches != alone:
            return self._score_batch(sequences, alone)[member]
        dtype = str(self.decoder.dtype).removeprefix("torch.")
        return NonFiniteScoreError(f"the score is {outputs[0]}: the model's numbers leave the range of {dtype}")

    def release_memory(self) -> None:
        """Give back the memory that is kept between calls: buffers, and prefixes."""
        with self._lock:
            if self.prefix_cache is not None:
                self.prefix_cache.clear()
            self._release_memory()

    def _give_up_cache(self) -> None:
        assert self.prefix_cache is not None
        logger.warning("out of memory: the prefix cache is given up; prefixes are read again in each call")
        self.prefix_cache.clear()
        self._given_up_tokens, self.prefix_cache = self.cached_tokens, None
        self._release_memory()

    def _release_memory(self) -> None:
        self.decoder.release_buffers()
        if self.decoder.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class _HostCopy:
    """Scores on their way from the device. Reading a tensor would wait for all that was launched after it, too."""

    host: Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def of(cls, scores: Tensor) -> _HostCopy:
        if scores.device.type != "cuda":
            return cls(scores)
        host = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
        host.copy_(scores, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(scores.device))  # which may not be the current device's
        return cls(host, arrived)

    def wait(self) -> list[Outputs]:
        if self.arrived is not None:
            self.arrived.synchronize()
        values: list[Outputs] = self.host.tolist()
        return values


@dataclass(frozen=True, slots=True)
class _Started:
    """A forward pass that was launched: its scores, or why there was no memory for it; and its part of the cache."""

    branches: list[Branch]
    scores: _HostCopy | str
    cached: CachedPass | None

    def settle(self, *, is_sound: bool) -> None:
        if self.cached is not None:
            self.cached.settle(is_sound=is_sound)


def _cache(decoder: Decoder, wanted: CacheBytes) -> PrefixCache | None:
    """The cache that is wanted, if any; its memory is taken now, before the token budget is measured.

    Raises:
        ValueError: it would be smaller than a block.
        DeviceError: the device has not the memory.
    """
    num_bytes = cache_bytes(wanted, decoder.device)
    smallest = PrefixCache.block_bytes(decoder.config, decoder.dtype)
    if num_bytes == 0 or (wanted == "auto" and num_bytes < smallest):
        return None
    cache = PrefixCache(num_bytes, decoder.config, decoder.dtype)
    try:
        decoder.score([_trial(decoder, CACHE_BLOCK_TOKENS)], [Branch(0)], cache=cache).tolist()
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise DeviceError(
            f"prefix_cache_bytes={num_bytes} do not fit the device's memory beside the weights"
        ) from error
    cache.forget()
    return cache


def _measured_budget(decoder: Decoder, memory_share: float) -> int:
    """The token budget for CUDA devices, from the memory that a trial pass takes and that is free now: the least of
    theirs.
    """
    num_tokens = min(TRIAL_TOKENS, decoder.config.max_tokens)
    cards = set(decoder.devices)
    decoder.release_buffers()
    torch.cuda.empty_cache()
    for card in cards:
        torch.cuda.reset_peak_memory_stats(card)
    before = {card: torch.cuda.memory_allocated(card) for card in cards}
    decoder.score([_trial(decoder, num_tokens)], [Branch(0)]).tolist()
    taken = {card: torch.cuda.max_memory_allocated(card) - before[card] for card in cards}
    decoder.release_buffers()
    torch.cuda.empty_cache()
    waiting = waiting_bytes(decoder.config.hidden_size, len(cards))
    budgets = []
    for card in cards:
        free, total = torch.cuda.mem_get_info(card)
        available = available_bytes(free, total, torch.cuda.memory_reserved(card), memory_share)
        if available <= 0:
            raise DeviceError(
                f"the weights leave nothing of this process's {memory_share:g} of {card}: give it more of a GPU, or two"
            )
        budgets.append(budget_for(available, taken[card] / num_tokens + waiting))
    return min(budgets)


def _trial(decoder: Decoder, num_tokens: int) -> list[int]:
    """A sequence of about so many tokens that the head can read."""
    gate = decoder.config.head.gate_pattern or ()
    return [*[0] * (num_tokens - len(gate)), *gate]


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
