"""Batches form under load, the oldest first; what is cancelled, late or broken harms nobody else."""

from __future__ import annotations

import ast
import asyncio
import logging
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from serve_app.batching import batch_queue
from serve_app.batching import batcher as batcher_module
from serve_app.batching import errors as batcher_errors
from serve_app.batching.admission import Admission
from serve_app.batching.batch_queue import BatchQueue
from serve_app.batching.batcher import BatchReport, TokenBatcher
from serve_app.batching.errors import (
    BatcherClosedError,
    BatcherStalledError,
    DeadlineExceededError,
    ForwardError,
    QueueFullError,
)
from serve_app.reward_model.errors import RaywardError, ScoringError, TokenIdsError
from serve_app.reward_model.prefixes import MIN_SHARED_TOKENS

T = TypeVar("T")
PATIENCE_S = 120.0  # until a test that hangs fails; nothing waits as long where all is well


def ids(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(90_000), k=length)


def score(sequence: list[int]) -> float:
    return float(hash(tuple(sequence)) % 1_000_003)


class Device:
    """Runs batches, each once the gate is open or a step is granted; keeps what it ran."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.calls: list[list[list[int]]] = []
        self.gate = threading.Event()
        self.steps = threading.Semaphore(0)
        if is_open:
            self.gate.set()

    def __call__(self, sequences: list[list[int]]) -> list[float | ScoringError]:
        self.calls.append(sequences)
        give_up = time.monotonic() + PATIENCE_S
        while not self.gate.is_set() and not self.steps.acquire(timeout=0.002):
            assert time.monotonic() < give_up, "the test never opened the gate"
        return [score(sequence) for sequence in sequences]


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(asyncio.wait_for(main(), 3 * PATIENCE_S))


async def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "it did not come to pass"
        await asyncio.sleep(0.001)


def batcher_of(
    device: Callable[..., Any], *, token_budget: int = 100, max_queued_tokens: int = 1_000_000, **options: Any
) -> TokenBatcher[float]:
    admission = Admission(max_queued_tokens=max_queued_tokens)
    return TokenBatcher(device, token_budget=token_budget, admission=admission, **options)


async def occupy(batcher: TokenBatcher[float], device: Device) -> asyncio.Task[Any]:
    """Keep the device busy with a request of one token."""
    task = asyncio.create_task(batcher.submit([[7]]))
    await until(lambda: len(device.calls) == 1)
    return task


async def wait_in_queue(
    batcher: TokenBatcher[float], requests: list[list[list[int]]], **options: Any
) -> list[asyncio.Task[Any]]:
    """Submit in this order, and return when all are in the queue."""
    tasks = [asyncio.create_task(batcher.submit(request, **options)) for request in requests]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def results_of(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


def scores(requests: list[list[list[int]]]) -> list[list[float]]:
    return [[score(sequence) for sequence in request] for request in requests]


def served(
    requests: list[list[list[int]]], *, token_budget: int, **options: Any
) -> tuple[list[Any], list[list[list[int]]]]:
    """Results of requests that wait together while the device is busy, and the batches they run in."""

    async def main() -> tuple[list[Any], list[list[list[int]]]]:
        device = Device()
        batcher = batcher_of(device, token_budget=token_budget, **options)
        first = await occupy(batcher, device)
        tasks = await wait_in_queue(batcher, requests)
        device.gate.set()
        results = await results_of(tasks)
        await first
        await batcher.close()
        return results, device.calls[1:]

    return run(main)


def test_a_lone_request_runs_at_once() -> None:
    async def main() -> None:
        device = Device(is_open=True)
        batcher = batcher_of(device)
        assert await batcher.submit([[1, 2], [3]]) == [score([1, 2]), score([3])]
        assert await batcher.submit([]) == []
        assert device.calls == [[[1, 2], [3]]]
        await batcher.close()

    run(main)


def test_requests_that_come_together_run_together_also_on_an_idle_device() -> None:
    async def main() -> None:
        device = Device(is_open=True)
        batcher = batcher_of(device)
        assert await asyncio.gather(*(batcher.submit([[n]]) for n in range(8))) == [[score([n])] for n in range(8)]
        assert device.calls == [[[n] for n in range(8)]]
        await batcher.close()

    run(main)


def test_what_waits_during_a_forward_pass_is_the_next_batch() -> None:
    requests = [[ids(2 * n, 10), ids(2 * n + 1, 10)] for n in range(12)]
    results, batches = served(requests, token_budget=100)
    assert results == scores(requests)
    flat = [sequence for request in requests for sequence in request]
    assert batches == [flat[:10], flat[10:20], flat[20:]]


def test_requests_join_the_next_batch_until_it_starts() -> None:
    async def main() -> None:
        device = Device()
        batcher = batcher_of(device)
        tasks = [await occupy(batcher, device)]
        for n in range(5):
            tasks += await wait_in_queue(batcher, [[[n]]])
            await asyncio.sleep(0.005)
        device.gate.set()
        await asyncio.gather(*tasks)
        assert device.calls[1:] == [[[n] for n in range(5)]]
        await batcher.close()

    run(main)


def test_the_next_batch_starts_while_the_event_loop_is_busy() -> None:
    """The device is fed before results are handed out: here the loop does nothing until the second batch runs."""

    async def main() -> None:
        device = Device()
        batcher = batcher_of(device)
        first = await occupy(batcher, device)
        tasks = await wait_in_queue(batcher, [[[1]]])
        device.steps.release()
        give_up = time.monotonic() + PATIENCE_S
        while len(device.calls) < 2:
            assert time.monotonic() < give_up
            time.sleep(0.001)
        assert not first.done()
        device.gate.set()
        assert await asyncio.gather(first, *tasks) == [[score([7])], [score([1])]]
        await batcher.close()

    run(main)


def test_the_next_batch_is_planned_on_the_event_loop_while_the_device_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    plan = BatchQueue.plan

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return plan(*arguments)

    monkeypatch.setattr(BatchQueue, "plan", noted)

    async def main() -> None:
        device = Device()
        batcher = batcher_of(device, token_budget=1)
        tasks = [await occupy(batcher, device), *await wait_in_queue(batcher, [[[n]] for n in range(3)])]
        for place in range(1, 4):
            await until(lambda planned=place + 1: len(threads) == planned)  # type: ignore[misc]
            assert threads == [False] + [True] * place
            device.steps.release()
            await until(lambda called=place + 1: len(device.calls) == called)  # type: ignore[misc]
        device.gate.set()
        await asyncio.gather(*tasks)
        await batcher.close()

    run(main)


def test_the_oldest_goes_first_and_younger_ones_fill_the_room() -> None:
    old, large, small = ids(0, 60), ids(1, 70), ids(2, 40)
    _, batches = served([[old], [large], [small], [ids(3, 30)]], token_budget=100)
    assert batches == [[old, small], [large, ids(3, 30)]]


def test_a_request_that_never_fits_beside_others_is_not_starved() -> None:
    requests = [[ids(0, 50)], [ids(1, 99)], *([ids(n, 50)] for n in range(2, 30))]
    _, batches = served(requests, token_budget=100)
    assert ids(1, 99) in batches[1]


def test_requests_with_the_batchs_prompt_go_before_older_ones() -> None:
    prompt = ids(0, 60)
    requests = [[prompt + [1] * 5], [ids(1, 25)], [ids(2, 25)], [prompt + [2] * 5], [prompt + [3] * 5]]
    _, batches = served(requests, token_budget=100)
    assert batches == [[*requests[0], *requests[3], *requests[4], *requests[1]], requests[2]]


def test_a_prompt_is_found_behind_a_beginning_that_all_requests_share() -> None:
    """A system prompt must not hide that two requests have the rest in common as well."""
    system = ids(0, 2 * MIN_SHARED_TOKENS)
    prompts = [system + ids(n, 40) for n in range(1, 5)]
    requests = [[prompt + [answer] * 4] for answer in (1, 2) for prompt in prompts]
    _, batches = served(requests, token_budget=130)
    # 76 for the first, 4 for its twin, 44 for the second (32 of its 76 are the system prompt's), 4 for its twin.
    assert batches[0] == [*requests[0], *requests[4], *requests[1], *requests[5]]


def test_shared_tokens_count_once_within_a_request_and_between_requests() -> None:
    prompt = ids(0, 50)
    requests = [[prompt + [1] * 5, prompt + [2] * 5], [prompt + [3] * 5], [prompt + [4] * 34], [ids(1, 1)], [ids(2, 1)]]
    reports: list[BatchReport] = []
    _, batches = served(requests, token_budget=100, observe=reports.append)
    assert [len(batch) for batch in batches] == [5, 1]
    assert reports[1].num_tokens == 55 * 3 + 84 + 1
    assert reports[1].occupancy == (50 + 5 * 3 + 34 + 1) / 100 == 1


def test_an_equal_sequence_costs_one_token() -> None:
    """As in the engine: each keeps the token at which its score is read."""
    reports: list[BatchReport] = []
    served([[ids(0, 40)] * 3, [ids(0, 40)]], token_budget=100, observe=reports.append)
    assert reports[1].occupancy == (39 + 4) / 100


def test_a_request_over_the_budget_runs_alone() -> None:
    prompt = ids(1, 300)
    requests = [[ids(0, 10)], [[*prompt, 1]], [ids(2, 10)], [[*prompt, 2]]]
    results, batches = served(requests, token_budget=100)
    assert results == scores(requests)
    assert batches == [[*requests[0], *requests[2]], requests[1], requests[3]]


def test_a_request_over_the_budget_is_not_split() -> None:
    request = [ids(n, 60) for n in range(4)]
    results, batches = served([request], token_budget=100)
    assert batches == [request]
    assert results == scores([request])


def test_sequences_the_scorer_refuses_pass_through_in_their_place() -> None:
    def refuse(sequences: list[list[int]]) -> list[float | ScoringError]:
        return [score(sequence) if sequence else TokenIdsError("the sequence is empty") for sequence in sequences]

    async def main() -> None:
        reports: list[BatchReport] = []
        batcher = batcher_of(refuse, observe=reports.append)
        first, error, last = await batcher.submit([[1], [], [-5, 2**70]])
        assert (first, last) == (score([1]), score([-5, 2**70]))
        assert isinstance(error, TokenIdsError)
        assert reports[0].errors == 1
        await batcher.close()

    run(main)


def test_a_request_that_is_cancelled_while_it_waits_never_runs() -> None:
    async def main() -> None:
        device = Device()
        batcher = batcher_of(device)
        first = await occupy(batcher, device)
        tasks = await wait_in_queue(batcher, [[ids(n, 50)] for n in range(4)])
        assert (batcher.running_tokens, batcher.queued_tokens) == (1, 200)
        await asyncio.sleep(0.01)  # the next batch is planned
        tasks[0].cancel()
        tasks[3].cancel()
        await asyncio.sleep(0)
        assert batcher.queued_tokens == 100
        device.gate.set()
        await asyncio.gather(first, tasks[1], tasks[2])
        assert device.calls[1:] == [[ids(1, 50), ids(2, 50)]]
        await until(lambda: (batcher.running_tokens, batcher.queued_tokens) == (0, 0))
        await batcher.close()

    run(main)


def test_a_request_that_is_cancelled_while_it_runs_is_forgotten() -> None:
    async def main() -> None:
        device = Device()
        batcher = batcher_of(device)
        tasks = await wait_in_queue(batcher, [[[1]], [[2]]])
        await until(lambda: len(device.calls) == 1)
        tasks[0].cancel()
        await asyncio.sleep(0)
        assert tasks[0].cancelled()
        device.gate.set()
        assert await tasks[1] == [score([2])]
        assert await batcher.submit([[3]]) == [score([3])]
        await batcher.close()

    run(main)


def test_a_deadline_that_has_passed_fails_at_once() -> None:
    """Also where the queue is full: to try again would be no use."""

    async def main() -> None:
        device = Device()
        batcher = batcher_of(device, max_queued_tokens=1)
        tasks = [await occupy(batcher, device), *await wait_in_queue(batcher, [[[1]]])]
        with pytest.raises(DeadlineExceededError):
            await batcher.submit([[2]], deadline=time.monotonic() - 1)
        device.gate.set()
        await asyncio.gather(*tasks)
        assert device.calls == [[[7]], [[1]]]
        await batcher.close()

    run(main)


def test_a_deadline_that_passes_while_waiting_fails_then() -> None:
    async def main() -> None:
        device = Device()
        batcher = batcher_of(device)
        first = await occupy(batcher, device)
        late = await wait_in_queue(batcher, [[ids(0, 30)]], deadline=time.monotonic() + 0.05)
        patient = await wait_in_queue(batcher, [[ids(1, 30)]], deadline=time.monotonic() + 60)
        with pytest.raises(DeadlineExceededError) as raised:
            await late[0]
        assert raised.value.waited_s >= 0.05
        assert not first.done()
        assert batcher.queued_tokens == 30
        device.gate.set()
        assert await asyncio.gather(first, *patient) == [[score([7])], [score(ids(1, 30))]]
        assert device.calls[1:] == [[ids(1, 30)]]
        await batcher.close()

    run(main)


def test_a_late_request_does_not_start_though_the_event_loop_is_too_busy_to_fail_it() -> None:
    async def main() -> None:
        device = Device()
        batcher = batcher_of(device)
        first = await occupy(batcher, device)
        late = await wait_in_queue(batcher, [[[1]]], deadline=time.monotonic() + 0.05)
        tasks = await wait_in_queue(batcher, [[[2]]])
        await asyncio.sleep(0.005)  # both are in the plan
        time.sleep(0.1)
        device.gate.set()
        give_up = time.monotonic() + PATIENCE_S
        while len(device.calls) < 2:
            assert time.monotonic() < give_up
            time.sleep(0.001)
        assert device.calls[1:] == [[[2]]]
        with pytest.raises(DeadlineExceededError):
            await late[0]
        await asyncio.gather(first, *tasks)
        await batcher.close()

    run(main)


def test_a_deadline_that_passes_while_running_is_no_concern() -> None:
    now = 0.0

    async def main() -> None:
        nonlocal now
        device = Device()
        batcher = batcher_of(device, clock=lambda: now)
        task = asyncio.create_task(batcher.submit([[1]], deadline=0.1))
        await until(lambda: len(device.calls) == 1)
        now = 1.0
        await asyncio.sleep(0.15)  # the timer goes off
        device.gate.set()
        assert await task == [score([1])]
        await batcher.close()

    run(main)


def test_overload_is_refused_at_once_and_over_when_the_queue_is() -> None:
    async def main() -> None:
        device = Device()
        batcher = batcher_of(device, max_queued_tokens=100)
        first = await occupy(batcher, device)
        tasks = await wait_in_queue(batcher, [[ids(0, 60)], [ids(1, 40)]])
        with pytest.raises(QueueFullError) as raised:
            await batcher.submit([[1]])
        assert raised.value.queued_tokens == 100
        assert raised.value.retry_after_s >= 1
        tasks[0].cancel()
        await asyncio.sleep(0)
        tasks += await wait_in_queue(batcher, [[ids(2, 60)]])
        device.gate.set()
        assert await asyncio.gather(first, *tasks[1:]) == [[score([7])], [score(ids(1, 40))], [score(ids(2, 60))]]
        assert await batcher.submit([[1]]) == [score([1])]
        await batcher.close()

    run(main)


def test_a_request_above_the_bound_is_taken_on_an_empty_queue() -> None:
    async def main() -> None:
        device = Device()
        batcher = batcher_of(device, max_queued_tokens=100)
        first = await occupy(batcher, device)
        large = await wait_in_queue(batcher, [[ids(0, 500)]])
        with pytest.raises(QueueFullError):
            await batcher.submit([[1]])
        device.gate.set()
        assert await asyncio.gather(first, *large) == [[score([7])], [score(ids(0, 500))]]
        await batcher.close()

    run(main)


def test_retry_after_is_the_time_that_the_measured_rate_needs() -> None:
    now = 0.0
    device = Device(is_open=True)

    def ten_tokens_a_second(sequences: list[list[int]]) -> list[float | ScoringError]:
        nonlocal now
        now += sum(map(len, sequences)) / 10
        return device(sequences)

    async def main() -> None:
        batcher = batcher_of(ten_tokens_a_second, max_queued_tokens=100, clock=lambda: now)
        for _ in range(3):
            await batcher.submit([ids(0, 50)])
        device.gate.clear()
        running = asyncio.create_task(batcher.submit([ids(0, 80)]))
        await until(lambda: len(device.calls) == 4)
        waiting = await wait_in_queue(batcher, [[ids(1, 90)]])
        with pytest.raises(QueueFullError) as raised:
            await batcher.submit([ids(2, 20)])
        assert raised.value.retry_after_s == 17
        device.gate.set()
        await asyncio.gather(running, *waiting)
        await batcher.close()

    run(main)


class UnpicklableError(Exception):
    """Not to be pickled: its constructor takes more than its arguments."""

    def __init__(self, _first: int, _second: int) -> None:
        super().__init__("bad kernel")


@pytest.mark.parametrize("place", range(8))
def test_a_request_that_breaks_the_forward_pass_fails_alone(place: int) -> None:
    requests = [[[n], [n, n]] for n in range(8)]
    calls = []

    def poisoned(sequences: list[list[int]]) -> list[float | ScoringError]:
        calls.append(len(sequences))
        if [place] in sequences:
            raise UnpicklableError(1, 2)
        return [score(sequence) for sequence in sequences]

    async def main() -> None:
        reports: list[BatchReport] = []
        batcher = batcher_of(poisoned, observe=reports.append)
        results = await results_of([asyncio.create_task(batcher.submit(request)) for request in requests])
        error = results.pop(place)
        assert isinstance(error, ForwardError)
        assert (error.cause_type, error.reason) == ("UnpicklableError", "bad kernel")
        assert results == scores(requests[:place] + requests[place + 1 :])
        assert sorted(calls) == [2, 2, 4, 4, 8, 8, 16]
        assert [report.errors for report in reports] == [2]
        assert await batcher.submit([[99]]) == [score([99])]
        batcher.check_health()
        await batcher.close()

    run(main)


def test_a_device_that_always_fails_is_asked_a_bounded_number_of_times() -> None:
    calls = []

    def broken(sequences: list[list[int]]) -> list[float | ScoringError]:
        calls.append(sequences)
        raise MemoryError

    async def main() -> None:
        batcher = batcher_of(broken)
        results = await results_of([asyncio.create_task(batcher.submit([[n]])) for n in range(8)])
        assert [type(result) for result in results] == [ForwardError] * 8
        assert len(calls) == 15
        await batcher.close()

    run(main)


@pytest.mark.parametrize("found", [[], [1.0, 2.0], None])
def test_a_wrong_number_of_results_is_an_error(found: Any) -> None:
    async def main() -> None:
        batcher = batcher_of(lambda _sequences: found)
        with pytest.raises(ForwardError):
            await batcher.submit([[1]])
        await batcher.close()

    run(main)


def test_a_cancelled_request_is_left_out_when_its_batch_is_halved() -> None:
    async def main() -> None:
        device = Device()

        def fail_once(sequences: list[list[int]]) -> list[float | ScoringError]:
            found = device(sequences)
            if len(device.calls) == 1:
                raise ValueError("once")
            return found

        batcher = batcher_of(fail_once)
        tasks = await wait_in_queue(batcher, [[[n]] for n in range(4)])
        await until(lambda: len(device.calls) == 1)
        tasks[1].cancel()
        await asyncio.sleep(0)
        device.gate.set()
        results = await results_of(tasks)
        assert [results[0], *results[2:]] == [[score([n])] for n in (0, 2, 3)]
        assert device.calls[1:] == [[[0]], [[2], [3]]]
        await batcher.close()

    run(main)


def test_a_request_that_fails_after_it_was_cancelled_harms_nobody() -> None:
    async def main() -> None:
        device = Device()

        def broken(sequences: list[list[int]]) -> list[float | ScoringError]:
            device(sequences)
            raise ValueError

        batcher = batcher_of(broken)
        tasks = await wait_in_queue(batcher, [[[1]], [[2]]])
        device.steps.release()
        await until(lambda: len(device.calls) == 2)
        tasks[0].cancel()
        await asyncio.sleep(0)
        device.gate.set()
        assert [type(result) for result in await results_of(tasks)] == [asyncio.CancelledError, ForwardError]
        await batcher.close()

    run(main)


def test_what_is_reported_of_a_batch() -> None:
    now = 0.0
    device = Device()

    def five_seconds(sequences: list[list[int]]) -> list[float | ScoringError]:
        nonlocal now
        found = device(sequences)
        now += 5
        return found

    async def main() -> None:
        nonlocal now
        reports: list[BatchReport] = []
        batcher = batcher_of(five_seconds, observe=reports.append, clock=lambda: now)
        first = await occupy(batcher, device)
        tasks = await wait_in_queue(batcher, [[ids(0, 30)]])
        now += 2
        tasks += await wait_in_queue(batcher, [[ids(1, 10), ids(2, 10)]])
        device.gate.set()
        await asyncio.gather(first, *tasks)
        assert reports[1] == BatchReport(
            num_requests=2, num_sequences=3, num_tokens=50, waited_s=(7, 5), forward_s=5, occupancy=0.5, errors=0
        )
        await batcher.close()

    run(main)


def test_the_loop_survives_an_observer_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    def observe(_report: BatchReport) -> None:
        raise KeyError("metrics")

    async def main() -> None:
        batcher = batcher_of(Device(is_open=True), observe=observe)
        for n in range(3):
            assert await batcher.submit([[n]]) == [score([n])]
        batcher.check_health()
        await batcher.close()

    with caplog.at_level(logging.ERROR):
        run(main)
    assert [record.message for record in caplog.records] == ["the observer of batches failed"] * 3


def test_health_fails_while_a_forward_pass_hangs() -> None:
    now = 0.0

    async def main() -> None:
        nonlocal now
        device = Device()
        batcher = batcher_of(device, stall_after_s=60, clock=lambda: now)
        now = 1000.0
        batcher.check_health()  # nothing to do is no stall
        first = await occupy(batcher, device)
        waiting = await wait_in_queue(batcher, [[[1]]])
        now += 60
        batcher.check_health()
        now += 1
        with pytest.raises(BatcherStalledError, match="a forward pass has run for 61 s, 1 requests wait"):
            batcher.check_health()
        device.gate.set()
        await asyncio.gather(first, *waiting)
        await until(lambda: batcher._running is None)  # answers are given before the pass is over
        now += 1000
        batcher.check_health()
        await batcher.close()

    run(main)


def test_a_batch_that_is_halved_makes_progress() -> None:
    now = 0.0

    async def main() -> None:
        def slow(sequences: list[list[int]]) -> list[float | ScoringError]:
            nonlocal now
            batcher.check_health()
            now += 50
            raise ValueError(len(sequences))

        batcher = batcher_of(slow, stall_after_s=60, clock=lambda: now)
        results = await results_of([asyncio.create_task(batcher.submit([[n]])) for n in range(4)])
        assert [getattr(result, "reason", None) for result in results] == ["1"] * 4
        await batcher.close()

    run(main)


def test_health_fails_while_work_waits_and_no_batch_starts() -> None:
    now = 0.0

    async def main() -> None:
        nonlocal now
        batcher = batcher_of(Device(is_open=True), stall_after_s=60, clock=lambda: now)
        now = 1000.0
        stuck = threading.Event()
        batcher._executor.submit(stuck.wait, PATIENCE_S)
        waiting = await wait_in_queue(batcher, [[[1]]])
        now += 60
        batcher.check_health()
        now += 1
        with pytest.raises(BatcherStalledError, match="no batch started for 61 s"):
            batcher.check_health()
        stuck.set()
        await asyncio.gather(*waiting)
        batcher.check_health()
        await batcher.close()

    run(main)


def test_a_deadline_that_passes_during_a_failing_pass_loses_no_request() -> None:
    """What runs has met its deadline: where the pass is repeated in halves, it is in one of them."""
    now = 0.0
    device = Device()

    def fails_in_company(sequences: list[list[int]]) -> list[float | ScoringError]:
        found = device(sequences)
        if len(sequences) > 1:
            raise ValueError("too much at once")
        return found

    async def main() -> None:
        nonlocal now
        batcher = batcher_of(fails_in_company, clock=lambda: now)
        tasks = await wait_in_queue(batcher, [[[1]], [[2]]], deadline=0.01)
        await until(lambda: len(device.calls) == 1)
        now = 1.0
        await asyncio.sleep(0.02)  # the timers of both go off
        device.gate.set()
        assert await results_of(tasks) == [[score([1])], [score([2])]]
        await batcher.close()

    run(main)


def test_a_dead_thread_fails_everybody_and_health() -> None:
    device = Device()

    def dying(sequences: list[list[int]]) -> list[float | ScoringError]:
        device(sequences)
        raise SystemExit("told to stop")

    async def main() -> None:
        batcher = batcher_of(dying, token_budget=1)
        tasks = await wait_in_queue(batcher, [[[n]] for n in range(3)])
        await until(lambda: len(device.calls) == 1)
        device.gate.set()
        assert [type(result) for result in await results_of(tasks)] == [BatcherStalledError] * 3
        with pytest.raises(BatcherStalledError, match="SystemExit: told to stop"):
            batcher.check_health()
        with pytest.raises(BatcherStalledError):
            await batcher.submit([[1]])
        assert len(device.calls) == 1
        await batcher.close()

    run(main)


def test_close_fails_what_waits_and_awaits_what_runs() -> None:
    async def main() -> None:
        device = Device()
        batcher = batcher_of(device)
        before = threading.active_count()
        first = await occupy(batcher, device)
        assert threading.active_count() == before + 1
        tasks = await wait_in_queue(batcher, [[[1]], [[2]]])
        closing = asyncio.create_task(batcher.close())
        assert [type(result) for result in await results_of(tasks)] == [BatcherClosedError] * 2
        assert not closing.done()
        device.gate.set()
        await closing
        assert await first == [score([7])]
        assert threading.active_count() == before
        assert len(device.calls) == 1
        with pytest.raises(BatcherClosedError, match="closed"):
            await batcher.submit([[1]])
        await batcher.close()

    run(main)


def test_close_awaits_a_forward_pass_whose_requests_are_all_cancelled() -> None:
    async def main() -> None:
        device = Device()
        batcher = batcher_of(device)
        (await occupy(batcher, device)).cancel()
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        device.gate.set()
        await closing

    run(main)


def test_an_event_loop_that_ends_leaves_no_work_behind() -> None:
    device = Device()
    batcher = batcher_of(device, token_budget=1)

    async def main() -> None:
        await occupy(batcher, device)
        await wait_in_queue(batcher, [[[n]] for n in range(5)])

    run(main)  # asyncio.run cancels what is left
    device.gate.set()
    batcher._executor.shutdown(wait=True)
    assert len(device.calls) == 1
    with pytest.raises(RuntimeError, match="one event loop"):
        run(lambda: batcher.submit([[1]]))


def drain_seconds(requests: list[list[list[int]]], token_budget: int) -> tuple[float, int]:
    """Processor seconds to submit and score `requests`, all waiting at once, and the number of batches."""
    began = time.process_time()
    results, batches = served(requests, token_budget=token_budget, max_queued_tokens=10**9)
    seconds = time.process_time() - began
    assert results == scores(requests)
    return seconds, len(batches)


@pytest.mark.parametrize("kind", ["apart", "one system prompt", "prompts in fours", "misfits"])
def test_ten_thousand_waiting_requests_take_seconds(kind: str) -> None:
    system, prompts = ids(0, 40), [ids(n, 60) for n in range(2500)]
    make: dict[str, Callable[[int], list[int]]] = {
        "apart": lambda n: ids(n, 100),
        "one system prompt": lambda n: system + ids(n, 60),
        "prompts in fours": lambda n: prompts[n % 2500] + ids(n, 40),
        "misfits": lambda n: ids(n, 600),
    }
    requests = [[make[kind](n)] for n in range(10_000)]
    seconds, num_batches = drain_seconds(requests, token_budget=1000)
    assert seconds < 60  # quadratic time would be many minutes
    assert num_batches >= 500


def test_a_plan_looks_at_a_bounded_part_of_the_queue() -> None:
    """Requests that do not fit are tried up to a limit: of two that would, only the one within it is found."""
    near = batch_queue.MAX_MISSES - 1
    misfits = [[ids(n, 90)] for n in range(1000, 1000 + 2 * near)]
    requests = [[ids(0, 80)], *misfits[:near], [ids(1, 10)], *misfits[near:], [ids(2, 10)]]
    _, batches = served(requests, token_budget=100)
    assert batches[0] == [ids(0, 80), ids(1, 10)]


UNLUCKY = 13
"""A sequence that ends with this token breaks its batch."""


def unreliable(sequences: list[list[int]]) -> list[float | ScoringError]:
    time.sleep(0.0005)
    if any(sequence[-1] == UNLUCKY for sequence in sequences):
        raise ValueError("unlucky")
    return [score(sequence) for sequence in sequences]


def random_request(chooser: random.Random, number: int, prompts: list[list[int]]) -> list[list[int]]:
    """One to four sequences; every hundredth request is unlucky."""
    last = UNLUCKY if number % 100 == 0 else 1
    return [[*chooser.choice(prompts), number, place, last] for place in range(chooser.randrange(1, 5))]


async def cancel_some(chooser: random.Random, tasks: list[asyncio.Task[Any]], tries: int) -> set[int]:
    """Cancel random tasks over time; the numbers of those that had not ended."""
    cancelled = set()
    for _ in range(tries):
        victim = chooser.randrange(len(tasks))
        if tasks[victim].cancel():
            cancelled.add(victim)
        await asyncio.sleep(0.0005)
    return cancelled


@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_its_own_result_whatever_happens_to_others(seed: int) -> None:
    chooser = random.Random(seed)
    prompts = [ids(n, 30) for n in range(20)]
    requests = [random_request(chooser, n, prompts) for n in range(1000)]

    async def client(batcher: TokenBatcher[float], request: list[list[int]], begin_s: float, patience_s: float) -> Any:
        await asyncio.sleep(begin_s)
        return await batcher.submit(request, deadline=time.monotonic() + patience_s)

    async def main() -> None:
        batcher = batcher_of(unreliable, token_budget=200)
        tasks = [
            asyncio.create_task(client(batcher, request, chooser.random() / 3, chooser.choice([60, 60, 0.05])))
            for request in requests
        ]
        cancelled = await cancel_some(chooser, tasks, 300)
        results = await results_of(tasks)
        expected = scores(requests)
        odd = {place: result for place, result in enumerate(results) if result != expected[place]}
        late = {place for place, result in odd.items() if isinstance(result, DeadlineExceededError)}
        failed = {place for place, result in odd.items() if isinstance(result, ForwardError)}
        assert {place for place, result in odd.items() if isinstance(result, asyncio.CancelledError)} == cancelled
        assert failed == set(range(0, 1000, 100)) - cancelled - late
        assert set(odd) == cancelled | late | failed
        assert len(odd) < 800
        await until(lambda: batcher.running_tokens == 0)
        assert batcher.queued_tokens == 0
        batcher.check_health()
        await batcher.close()

    run(main)


@pytest.mark.parametrize(
    "error",
    [
        QueueFullError(5000, 3),
        DeadlineExceededError(1.25),
        ForwardError("OutOfMemoryError", "no room"),
        BatcherClosedError(),
        BatcherStalledError("a forward pass has run for 301 s"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_pickle_whole(error: RaywardError) -> None:
    error.add_note("in replica 3")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_every_error_is_one_of_ours() -> None:
    kinds = [kind for kind in vars(batcher_errors).values() if isinstance(kind, type) and kind is not RaywardError]
    assert kinds
    assert all(issubclass(kind, RaywardError) for kind in kinds)


@pytest.mark.parametrize("module", [batch_queue, batcher_module, batcher_errors], ids=lambda module: module.__name__)
def test_the_batcher_needs_nothing_but_the_engines_small_change(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}
    assert ours <= {
        "serve_app.batching.admission",
        "serve_app.batching.batch_queue",
        "serve_app.batching.errors",
        "serve_app.reward_model.errors",
        "serve_app.reward_model.prefixes",
    }


@pytest.mark.parametrize("option", ["token_budget", "max_queued_tokens"])
def test_budgets_are_positive(option: str) -> None:
    with pytest.raises(ValueError, match="positive"):
        batcher_of(Device(), **{option: 0})


def test_a_device_that_fails_for_everybody_is_unhealthy() -> None:
    """As a CUDA context is after an error: every pass raises at once, and moves on."""
    broken = True

    def device(sequences: list[list[int]]) -> list[float | ScoringError]:
        if broken:
            raise RuntimeError("an illegal memory access")
        return [score(sequence) for sequence in sequences]

    async def main() -> None:
        nonlocal broken
        batcher = batcher_of(device)
        for _ in range(batcher_module.MAX_FAILURES_IN_A_ROW):
            batcher.check_health()
            with pytest.raises(ForwardError):
                await batcher.submit([ids(1, 5)])
        with pytest.raises(BatcherStalledError, match="in a row|batches failed"):
            batcher.check_health()
        broken = False
        await batcher.submit([ids(1, 5)])
        batcher.check_health()
        await batcher.close()

    run(main)
