"""Scores of conversations that a job met before: by the process itself, by its other processes, and before the job.

A process looks among what it scored last, then asks the actors that the job's processes share, then the indexes of
scores in files (`remembered.py`). What is nowhere is computed. Two processes that meet a conversation at the same
moment both compute it.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pyarrow as pa

from jobs.scoring.remembered import Key, key_of
from serve_app.reward_model.errors import ScoringError
from serve_app.reward_model.scores import Outputs

if TYPE_CHECKING:
    import ray

logger = logging.getLogger(__name__)
M = TypeVar("M")

MAX_REMEMBERED = 1 << 18
"""Scores that a process remembers, in some 50 MB."""
MAX_SHARED = 1 << 20
"""Scores that an actor of `SharedScores` remembers, in some 200 MB."""
PROCESSES_PER_SHARE = 16
ANSWER_TIMEOUT_S = 5.0
SILENT_S = 30.0

REUSED, REPEATED, NOT_COMPUTED = "scores_reused", "scores_repeated", "tokens_not_computed"
"""Counts of a unit: scores of earlier outputs, those of a conversation that the job had before, and their tokens."""


class KnownScores(Protocol):
    """Scores by key that can be looked up."""

    def find(self, keys: Sequence[Key]) -> dict[Key, Outputs]:
        """The scores of the keys that are known."""
        ...


class RecentScores:
    """The last scores that were told or asked for, `most` at most. Calls from several threads take turns."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[Key, Outputs] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, keys: Sequence[Key]) -> dict[Key, Outputs]:
        """The scores of the keys that are known."""
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
            for key in found:
                self._known.move_to_end(key)
        return found

    def add(self, scores: Mapping[Key, Outputs]) -> None:
        """Take scores in; the oldest ones go where there are too many."""
        with self._lock:
            for key, outputs in scores.items():
                self._known[key] = outputs
                self._known.move_to_end(key)
            while len(self._known) > self._most:
                self._known.popitem(last=False)


@dataclass(slots=True)
class SharedScores:
    """Scores that a job's processes tell each other, in actors that hold a share of the keys each.

    They are a help and no need: an actor that is lost comes back empty, and nobody waits for one that is slow.
    """

    shares: tuple[ray.actor.ActorHandle[Any], ...]
    _silent_until: float = field(default=0.0, init=False)

    @classmethod
    @contextmanager
    def among(cls, num_processes: int) -> Iterator[SharedScores | None]:
        """The scores that so many processes share, on the connected Ray, until the end of the context; None for one,
        which needs no other's."""
        import ray

        if num_processes < 2:
            yield None
            return
        share: Any = ray.remote(num_cpus=0, max_restarts=-1)(RecentScores)
        shared = cls(tuple(share.remote(MAX_SHARED) for _ in range(math.ceil(num_processes / PROCESSES_PER_SHARE))))
        try:
            yield shared
        finally:
            for actor in shared.shares:
                with suppress(ray.exceptions.RayError):  # what went wrong before is what counts
                    ray.kill(actor)

    def find(self, keys: Sequence[Key]) -> dict[Key, Outputs]:
        """The scores of the keys that another process has told, as far as an answer comes in time."""
        import ray

        if not keys or time.monotonic() < self._silent_until:
            return {}
        asked = [self.shares[share].find.remote(own) for share, own in self._split(keys).items()]
        try:
            answers: list[dict[Key, Outputs]] = ray.get(asked, timeout=ANSWER_TIMEOUT_S)
        except ray.exceptions.RayError as error:  # GetTimeoutError is one
            logger.warning(
                "what other actors have scored cannot be asked for (%s): equal conversations may be computed again",
                type(error).__name__,
            )
            self._silent_until = time.monotonic() + SILENT_S
            return {}
        return {key: outputs for answer in answers for key, outputs in answer.items()}

    def add(self, scores: Mapping[Key, Outputs]) -> None:
        """Tell the others; whether they hear it is not waited for."""
        for share, own in self._split(scores).items():
            self.shares[share].add.remote({key: scores[key] for key in own})

    def _split(self, keys: Sequence[Key] | Mapping[Key, Outputs]) -> dict[int, list[Key]]:
        parts: dict[int, list[Key]] = {}
        for key in keys:
            parts.setdefault(key[0] % len(self.shares), []).append(key)
        return parts


@dataclass(slots=True)
class UnitScores:
    """The scores of one unit and its counts. `told` is called with the number of sequences that are scored, now and
    then, and with the tokens read for them."""

    told: Callable[[int, int], None] | None = None
    scores: dict[Key, Outputs] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def table(self) -> pa.Table:
        """The keys and scores: `key` binary(16), `outputs` list of float32."""
        values = pa.array([list(outputs) for outputs in self.scores.values()], pa.list_(pa.float32()))
        return pa.table({"key": pa.array(list(self.scores), pa.binary(16)), "outputs": values})


@dataclass(frozen=True, slots=True)
class Recalled:
    """Sequences of which some are known: `missing` are the places of those that have to be computed, each once."""

    missing: list[int]
    _memory: ScoreMemory
    _keys: list[Key]
    _lengths: list[int]
    _known: Mapping[Key, Outputs]
    _reused: frozenset[Key]

    def completed(
        self, computed: Sequence[Outputs | ScoringError], *, remember: bool = True
    ) -> list[Outputs | ScoringError]:
        """The outcome of each sequence, in order, from those of the missing ones, which are to be remembered or not."""
        made = {self._keys[place]: one for place, one in zip(self.missing, computed, strict=True)}
        scores = {key: one for key, one in made.items() if not isinstance(one, ScoringError)}
        kept = scores if remember else {}
        known = {**self._known, **kept}
        self._memory.learn(known, made=kept)
        num_tokens = sum(self._lengths[place] for place in self.missing)
        self._memory.note(known, self._counts(scores), len(self._keys), num_tokens)
        outcomes = {**self._known, **made}
        # An error is a row's own: whoever gets it may write a place into it.
        return [copy.copy(one) if isinstance(one := outcomes[key], ScoringError) else one for key in self._keys]

    def _counts(self, scores: Mapping[Key, Outputs]) -> Counter[str]:
        counts: Counter[str] = Counter()
        computed = set(self.missing)
        for place, key in enumerate(self._keys):
            if place not in computed and (key in self._known or key in scores):
                counts[REUSED if key in self._reused else REPEATED] += 1
                counts[NOT_COMPUTED] += self._lengths[place]
        return counts


class ScoreMemory:
    """What a process remembers. Threads may use it at the same time, each for a unit of its own.

    Args:
        reused: scores of earlier outputs.
        before: scores of the job itself, before it was started again.
        shared: scores of the job's other processes.
        processor: the kind that this one computes on: scores of another kind are not found.
    """

    def __init__(
        self, reused: KnownScores, before: KnownScores, shared: SharedScores | None = None, *, processor: str
    ) -> None:
        self._reused, self._before, self._shared, self._processor = reused, before, shared, processor
        self._recent = RecentScores(MAX_REMEMBERED)
        self._threads = threading.local()

    @contextmanager
    def unit(self, told: Callable[[int, int], None] | None = None) -> Iterator[UnitScores]:
        """The unit that this thread scores until the end of the context; `told` as `UnitScores` says."""
        self._threads.unit = UnitScores(told)
        try:
            yield self._threads.unit
        finally:
            del self._threads.unit

    def outputs(
        self,
        sequences: Sequence[Sequence[int]],
        compute: Callable[[Sequence[Sequence[int]]], list[Outputs | ScoringError]],
    ) -> list[Outputs | ScoringError]:
        """The outcome of each sequence, in order, with the bits that computing all of them would give."""
        recalled = self.recall(sequences)
        return recalled.completed(compute([sequences[place] for place in recalled.missing]))

    def recall(self, sequences: Sequence[Sequence[int]]) -> Recalled:
        """What is known of the sequences."""
        keys = [key_of(sequence, self._processor) for sequence in sequences]
        firsts = {key: place for place, key in reversed(list(enumerate(keys)))}
        known: dict[Key, Outputs] = {}
        sources: list[KnownScores | None] = [self._recent, self._shared, self._before]
        for source in sources:
            if source is not None:
                known |= source.find([key for key in firsts if key not in known])
        reused = self._reused.find([key for key in firsts if key not in known])
        known |= reused
        missing = sorted(place for key, place in firsts.items() if key not in known)
        return Recalled(missing, self, keys, list(map(len, sequences)), known, frozenset(reused))

    def learn(self, scores: Mapping[Key, Outputs], *, made: Mapping[Key, Outputs]) -> None:
        """Remember scores; those that were `made` just now are news to other processes."""
        self._recent.add(scores)
        if self._shared is not None and made:
            self._shared.add(made)

    def note(self, scores: Mapping[Key, Outputs], counts: Counter[str], num_sequences: int, num_tokens: int) -> None:
        """Count scores for the unit of this thread: of so many sequences, for which so many tokens were read."""
        unit: UnitScores | None = getattr(self._threads, "unit", None)
        if unit is None:
            return
        unit.scores |= scores
        unit.counts += counts
        if unit.told is not None:
            unit.told(num_sequences, num_tokens)


def memory_of(model: object) -> ScoreMemory | None:
    """The memory of a model that was given one by `remembering`; None for another."""
    memory = getattr(_holder(model), "memory", None)
    return memory if isinstance(memory, ScoreMemory) else None


def remembering(load: Callable[[], M], reused: KnownScores, before: KnownScores, shared: SharedScores | None) -> M:
    """The model that `load` makes, with a memory as `ScoreMemory` says where it can have one."""
    model = load()
    if hasattr(holder := _holder(model), "memory"):
        holder.memory = ScoreMemory(reused, before, shared, processor=holder.processor)
    return model


def _holder(model: object) -> Any:
    """What of a model asks a memory: the scorer of one in this process, or a served one itself."""
    return getattr(model, "scorer", model)
