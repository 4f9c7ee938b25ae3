"""TokenBatcher: concurrent requests in, one forward pass after another out, inside the process that has the model.

The batcher pulls: a batch is whatever waits when the device becomes free, so a lone request never waits for company
and batches grow with the load. Two threads take part. The event loop takes requests in, plans the next batch while
the device is busy, and hands results out. A thread of its own runs one forward pass after another; it fetches the
planned batch itself, so that a busy event loop leaves no gap between two passes. What both touch is under one lock.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from serve_app.batching.admission import Admission
from serve_app.batching.batch_queue import BatchQueue, Request, RequestBatch
from serve_app.batching.errors import (
    BatcherClosedError,
    BatcherStalledError,
    DeadlineExceededError,
    ForwardError,
    QueueFullError,
)
from serve_app.reward_model.errors import ScoringError

logger = logging.getLogger(__name__)

Given = TypeVar("Given")
Outcomes: TypeAlias = list[Given | ScoringError]
Run: TypeAlias = Callable[[list[list[int]]], Outcomes[Given]]
"""`SequenceScorer.outputs`: what a model gives for each sequence, in order."""

MAX_FAILURES_IN_A_ROW = 8
"""Batches that may fail whole, one after the other, before `check_health` does: a CUDA error stays until the end of
its process."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One batch: `num_tokens` counts every sequence whole, `occupancy` counts shared prefixes once, over the budget.

    `waited_s` is each request's time from `submit` to the start of the batch; `forward_s` includes repeated passes
    after a failure. `errors` is the number of sequences without a score. Requests that were cancelled while they ran
    count too.
    """

    num_requests: int
    num_sequences: int
    num_tokens: int
    waited_s: tuple[float, ...]
    forward_s: float
    occupancy: float
    errors: int


@dataclass(slots=True)
class _Caller(Generic[Given]):
    """The future of a request's outcomes, which `submit` waits for, and the timer of its deadline."""

    future: asyncio.Future[Outcomes[Given]]
    timer: asyncio.TimerHandle | None = None


class TokenBatcher(Generic[Given]):
    """Scores concurrent requests in batches, on one device. Use from one event loop; `close` it in the end.

    Args:
        run: scores sequences, called in one thread only.
        token_budget: tokens of a batch, shared prefixes counted once; a request over it runs alone.
        admission: how much may wait; beyond that `submit` refuses at once. It learns the rate of this batcher's passes.
        stall_after_s: `check_health` fails after this many seconds without progress.
        observe: told of every batch, on the event loop, after its results are out.
        clock: monotonic seconds, which deadlines refer to.
        executor: one thread, to call `run` in; the batcher shuts it down. On CPU give the one that loaded the model:
            each thread that computes with PyTorch brings a pool of threads, and two pools slow each other down.
    """

    def __init__(
        self,
        run: Run[Given],
        *,
        token_budget: int,
        admission: Admission,
        stall_after_s: float = 300.0,
        observe: Callable[[BatchReport], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        executor: ThreadPoolExecutor | None = None,
    ) -> None:
        if token_budget < 1:
            raise ValueError(f"token_budget is positive: {token_budget}")
        self._run = run
        self._token_budget = token_budget
        self._admission = admission
        self._stall_after_s = stall_after_s
        self._observe = observe
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._callers: dict[Request, _Caller[Given]] = {}
        self._is_closed = False
        self._is_tending = False
        # Under the lock from here on.
        self._lock = threading.Lock()
        self._queue = BatchQueue()
        self._plan: RequestBatch | None = None  # of requests in the queue: it may be dropped and made again at any time
        self._running: RequestBatch | None = None
        self._pump: Future[None] | None = None
        self._death: str | None = None
        self._moved_at = clock()
        self._failures_in_a_row = 0

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait, every sequence counted whole."""
        return self._queue.num_tokens

    @property
    def queued_seconds(self) -> float:
        """Seconds of work taken on and not finished, at the rate of the passes so far."""
        return self._admission.seconds_for(self.queued_tokens + self.running_tokens)

    @property
    def running_tokens(self) -> int:
        """Tokens in the batch that runs, every sequence counted whole."""
        running = self._running
        return 0 if running is None else running.num_tokens

    async def submit(self, sequences: Sequence[list[int]], *, deadline: float | None = None) -> Outcomes[Given]:
        """The outcome of each sequence, in order. They run in one batch. Cancelling gives their place up.

        Args:
            sequences: token ids; they must not change until this returns.
            deadline: in seconds of the batcher's clock; a request that has not started by then fails.

        Raises:
            QueueFullError: too much waits already, or more than can be done by the deadline.
            DeadlineExceededError: the deadline passed before the request's turn.
            ForwardError: the forward pass raises for this request, also when it is alone.
            BatcherClosedError: the batcher is closed.
            BatcherStalledError: the batcher's thread died.
        """
        if not sequences:
            return []
        loop = self._bound_loop()
        now = self._clock()
        deadline = math.inf if deadline is None else deadline
        if deadline <= now:
            raise DeadlineExceededError(0.0)
        request = Request(list(sequences), now, deadline)
        self._enter(request)
        self._callers[request] = _Caller(loop.create_future())
        self._tend_soon()
        if deadline < math.inf:
            self._set_timer(request)
        try:
            return await self._callers[request].future
        finally:
            self._withdraw(request)

    def check_health(self) -> None:
        """Raises `BatcherStalledError` if the thread died or there is work that does not move. From any thread."""
        with self._lock:
            still_s = self._clock() - self._moved_at
            num_waiting, running = len(self._queue), self._running
        if self._death is not None:
            raise BatcherStalledError(self._death)
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            raise BatcherStalledError(f"the last {self._failures_in_a_row} batches failed: the device may be broken")
        if still_s > self._stall_after_s and (running or num_waiting):
            what = f"a forward pass has run for {still_s:.0f} s" if running else f"no batch started for {still_s:.0f} s"
            raise BatcherStalledError(f"{what}, {num_waiting} requests wait")

    async def close(self) -> None:
        """Refuse new requests, fail those that wait, and return when the running batch is done and the thread ended.

        A forward pass cannot be interrupted. Where this is cancelled, the thread ends after the pass that it is in.
        """
        self._is_closed = True
        self._fail_waiting(BatcherClosedError)
        pump = self._pump
        try:
            if pump is not None:
                await asyncio.wait([asyncio.wrap_future(pump)])
            if self._callers:
                await asyncio.wait([caller.future for caller in self._callers.values()])
        finally:
            self._executor.shutdown(wait=pump is None or pump.done())

    def _bound_loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, which is the same in every call."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise RuntimeError("a TokenBatcher serves one event loop: make another for this one")
        return loop

    def _enter(self, request: Request) -> None:
        """Put a request into the queue, and into the plan if it fits, or raise."""
        if self._is_closed:
            raise BatcherClosedError
        with self._lock:
            if self._death is not None:
                raise BatcherStalledError(self._death)
            queued = self._queue.num_tokens
            ahead = queued + self.running_tokens
            if not self._admission.admits(
                waiting_sequences=self._queue.num_sequences,
                waiting_tokens=queued,
                ahead_tokens=ahead,
                sequences=len(request.sequences),
                tokens=request.num_tokens,
                seconds_left=request.deadline - request.submitted,
            ):
                raise QueueFullError(queued, self._admission.retry_after_s(ahead))
            if not self._queue and self._running is None:
                self._moved_at = request.submitted
            self._queue.add(request)
            if self._plan is not None:
                self._plan.add(request)

    def _withdraw(self, request: Request) -> None:
        """Let go of a request, wherever it is: nobody waits for it any more."""
        caller = self._callers.pop(request)
        if caller.timer is not None:
            caller.timer.cancel()
        request.is_withdrawn = True
        self._unqueue(request)

    def _unqueue(self, request: Request) -> bool:
        """Take a request out of the queue. Returns whether it was there."""
        with self._lock:
            if request not in self._queue:
                return False
            self._queue.remove(request)
            if self._plan is not None and request in self._plan.requests:
                self._plan = None
        self._tend_soon()
        return True

    def _set_timer(self, request: Request) -> None:
        delay_s = request.deadline - self._clock()
        self._callers[request].timer = self._bound_loop().call_later(delay_s, self._expire, request)

    def _expire(self, request: Request) -> None:
        if self._clock() < request.deadline:
            self._set_timer(request)
        elif self._unqueue(request):  # one that runs already keeps its place in the batch, and gets its scores
            self._fail(request, DeadlineExceededError(self._clock() - request.submitted))

    def _fail_waiting(self, error: Callable[[], Exception]) -> None:
        with self._lock:
            waiting = list(self._queue)
            self._plan = None
            for request in waiting:
                self._queue.remove(request)
        for request in waiting:
            self._fail(request, error())

    def _tend_soon(self) -> None:
        """Tend after the callbacks that are ready now: requests that arrive together start together."""
        if not self._is_tending:
            self._is_tending = True
            self._bound_loop().call_soon(self._tend)

    def _tend(self) -> None:
        """Set an idle thread to work; while it is busy, plan what it does next."""
        self._is_tending = False
        with self._lock:
            if not self._queue:
                return
            if self._pump is None:
                self._pump = self._executor.submit(self._run_batches)
            elif self._plan is None:
                self._plan = self._queue.plan(self._token_budget, self._clock())

    # In the thread, from here on.

    def _run_batches(self) -> None:
        """Run batch after batch until nothing waits. Only what stops a whole process, as SystemExit, ends it early."""
        try:
            while (batch := self._take()) is not None and self._post(self._tend):
                outcomes = self._forward(batch)
                forward_s = self._clock() - batch.started
                self._measure(batch, forward_s)
                self._post(self._deliver, batch, outcomes, forward_s)
        except BaseException as error:
            logger.critical("the batcher's thread died", exc_info=error)
            self._die(error)

    def _take(self) -> RequestBatch | None:
        """The next batch, off the queue; None if nothing waits, and the thread is idle then."""
        with self._lock:
            batch, self._plan, self._running = self._plan, None, None
            now = self._clock()
            if batch is None or batch.has_late(now):
                batch = self._queue.plan(self._token_budget, now)
            if not batch.requests:
                self._pump = None
                return None
            for request in batch.requests:
                self._queue.remove(request)
            batch.started = self._moved_at = now
            batch.left_others = len(self._queue) > 0
            self._running = batch
            return batch

    def _forward(self, batch: RequestBatch) -> dict[Request, Outcomes[Given] | ForwardError]:
        """Each request's outcomes. Where the pass fails, the batch is halved, in n requests at most 2 n - 1 passes."""
        outcomes: dict[Request, Outcomes[Given] | ForwardError] = {}
        parts = [list(batch.requests)]
        while parts:
            part = [request for request in parts.pop() if not request.is_withdrawn]
            if not part:
                continue
            middle = len(part) // 2
            try:
                outcomes |= self._score(part)
            except Exception as error:
                if middle:
                    logger.warning("a batch of %d requests failed and is halved: %r", len(part), error)
                    parts += [part[middle:], part[:middle]]
                else:
                    logger.error("a request failed alone", exc_info=error)
                    outcomes[part[0]] = ForwardError(type(error).__name__, str(error))
        has_failed = bool(outcomes) and all(isinstance(outcome, ForwardError) for outcome in outcomes.values())
        self._failures_in_a_row = self._failures_in_a_row + 1 if has_failed else 0
        return outcomes

    def _score(self, requests: list[Request]) -> dict[Request, Outcomes[Given]]:
        """One forward pass."""
        self._moved_at = self._clock()
        sequences = [sequence for request in requests for sequence in request.sequences]
        found = self._run(sequences)
        if len(found) != len(sequences):
            raise RuntimeError(f"{len(found)} results came back for {len(sequences)} sequences")
        results = iter(found)
        return {request: [next(results) for _ in request.sequences] for request in requests}

    def _measure(self, batch: RequestBatch, forward_s: float) -> None:
        with self._lock:
            self._admission.measure(batch.num_tokens, forward_s, is_full=batch.left_others)

    def _die(self, error: BaseException) -> None:
        with self._lock:
            self._death = f"the batcher's thread died: {type(error).__name__}: {error}"
            batch, self._running = self._running, None
        self._post(self._fail_all, batch, self._death)

    def _post(self, callback: Callable[..., None], *args: object) -> bool:
        """Call on the event loop. Returns False if that is closed: nobody is left who waits for a result."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            return False
        return True

    # On the event loop again.

    def _deliver(
        self, batch: RequestBatch, outcomes: dict[Request, Outcomes[Given] | ForwardError], forward_s: float
    ) -> None:
        for request, outcome in outcomes.items():
            caller = self._callers.get(request)
            if isinstance(outcome, ForwardError):
                self._fail(request, outcome)
            elif caller is not None and not caller.future.done():
                caller.future.set_result(outcome)
        if self._observe is None:
            return
        try:
            self._observe(self._report(batch, outcomes, forward_s))
        except Exception:
            logger.exception("the observer of batches failed")

    def _report(
        self, batch: RequestBatch, outcomes: dict[Request, Outcomes[Given] | ForwardError], forward_s: float
    ) -> BatchReport:
        return BatchReport(
            num_requests=len(batch.requests),
            num_sequences=sum(len(request.sequences) for request in batch.requests),
            num_tokens=batch.num_tokens,
            waited_s=tuple(batch.started - request.submitted for request in batch.requests),
            forward_s=forward_s,
            occupancy=batch.packed_tokens / self._token_budget,
            errors=sum(_num_errors(request, outcome) for request, outcome in outcomes.items()),
        )

    def _fail_all(self, batch: RequestBatch | None, reason: str) -> None:
        for request in batch.requests if batch is not None else ():
            self._fail(request, BatcherStalledError(reason))
        self._fail_waiting(lambda: BatcherStalledError(reason))

    def _fail(self, request: Request, error: Exception) -> None:
        """Raise `error` in the request's `submit`, unless that was cancelled."""
        caller = self._callers.get(request)
        if caller is not None and not caller.future.done():
            caller.future.set_exception(error)


def _num_errors(request: Request, outcome: Outcomes[Given] | ForwardError) -> int:
    if isinstance(outcome, ForwardError):
        return len(request.sequences)
    return sum(isinstance(result, ScoringError) for result in outcome)
