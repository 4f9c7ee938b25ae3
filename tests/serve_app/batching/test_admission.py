"""What may wait: a trainer's burst always, beyond it what the rate of real passes does in time."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from typing import Any

import pytest

from serve_app.batching.admission import RATE_MEMORY, Admission
from serve_app.batching.batcher import TokenBatcher
from serve_app.batching.errors import QueueFullError

TRIES, PAUSE_S = 5, 0.02
"""OpenRLHF's client asks five times, a second apart, whatever Retry-After says; here with shorter seconds."""


def admits(admission: Admission, *, waiting: int, tokens: int = 100, seconds_left: float = math.inf) -> bool:
    """Whether a request of one sequence of 100 tokens may join `waiting` others of `tokens` each."""
    return admission.admits(
        waiting_sequences=waiting,
        waiting_tokens=waiting * tokens,
        ahead_tokens=waiting * tokens,
        sequences=1,
        tokens=100,
        seconds_left=seconds_left,
    )


def test_a_burst_waits_however_slow_the_first_trial_was() -> None:
    admission = Admission(max_wait_s=30.0, burst=4096, guessed_tokens_per_s=0.1)
    assert admits(admission, waiting=4095)
    assert not admits(admission, waiting=4096)


def test_a_fast_trial_admits_more_than_a_burst_until_passes_show_the_rate() -> None:
    admission = Admission(max_wait_s=30.0, burst=10, guessed_tokens_per_s=1000.0)
    assert admits(admission, waiting=299)
    assert not admits(admission, waiting=300)
    admission.measure(1000, 10.0, is_full=True)
    assert not admits(admission, waiting=30)
    assert admits(admission, waiting=29)


def test_lone_requests_show_nothing_of_what_a_batch_does() -> None:
    admission = Admission(max_wait_s=10.0, guessed_tokens_per_s=1000.0)
    for _ in range(100):
        admission.measure(10, 1.0, is_full=False)
    assert admission.tokens_per_s == 1000.0
    admission.measure(20_000, 10.0, is_full=True)
    assert admission.tokens_per_s == 2000.0


def test_the_rate_follows_the_last_passes() -> None:
    admission = Admission()
    for _ in range(100):
        admission.measure(1000, 1.0, is_full=True)
    for _ in range(round(math.log(0.05, RATE_MEMORY))):
        admission.measure(2000, 1.0, is_full=True)
    assert admission.tokens_per_s == pytest.approx(2000, rel=0.05)
    assert admission.retry_after_s(20_000) == 11


def test_what_cannot_be_done_by_its_deadline_is_refused_once_the_rate_is_known() -> None:
    admission = Admission(max_wait_s=30.0, burst=4096, guessed_tokens_per_s=1.0)
    assert admits(admission, waiting=100, seconds_left=1.0)
    admission.measure(1000, 1.0, is_full=True)
    assert admits(admission, waiting=100, seconds_left=11.0)
    assert not admits(admission, waiting=100, seconds_left=9.0)
    assert admits(admission, waiting=0, seconds_left=0.001)


def test_a_bound_in_tokens_replaces_all_else() -> None:
    admission = Admission(max_queued_tokens=1000, max_wait_s=30.0, burst=4096, guessed_tokens_per_s=1e9)
    assert admits(admission, waiting=9)
    assert not admits(admission, waiting=10)


def device(sequences: list[list[int]]) -> list[Any]:
    """Takes as long as 50,000 tokens a second do."""
    time.sleep(sum(map(len, sequences)) / 50_000)
    return [[float(len(sequence))] for sequence in sequences]


async def asks_like_openrlhf(batcher: TokenBatcher[Any], sample: list[int]) -> bool:
    """Whether a sample gets its reward."""
    for _ in range(TRIES):
        try:
            return bool(await batcher.submit([sample]))
        except QueueFullError:
            await asyncio.sleep(PAUSE_S)
    return False


@pytest.mark.parametrize(("burst", "is_lost"), [(4096, False), (8, True)])
def test_a_trainer_s_batch_of_512_loses_no_sample(burst: int, is_lost: bool) -> None:
    """The trial said 20 tokens a second; without a burst samples are lost, which shows that the batch is too much."""

    async def main() -> list[bool]:
        admission = Admission(max_wait_s=0.2, burst=burst, guessed_tokens_per_s=20.0)
        batcher = TokenBatcher(device, token_budget=1000, admission=admission)
        samples = [[place] * 100 for place in range(512)]
        rewards = await asyncio.gather(*(asks_like_openrlhf(batcher, sample) for sample in samples))
        await batcher.close()
        return rewards

    assert all(asyncio.run(main())) is not is_lost


def test_five_times_too_much_is_refused_at_once_and_the_device_stays_busy() -> None:
    async def main() -> None:
        admission = Admission(max_wait_s=0.1, burst=16, guessed_tokens_per_s=20.0)
        batcher = TokenBatcher(device, token_budget=1000, admission=admission)
        refused_after: list[float] = []
        pauses: list[int] = []

        async def ask() -> int:
            began = time.monotonic()
            try:
                await batcher.submit([[1] * 100])
            except QueueFullError as error:
                refused_after.append(time.monotonic() - began)
                pauses.append(error.retry_after_s)
                return 0
            return 1

        began = time.monotonic()
        tasks = []
        for _ in range(100):  # 25 requests each 10 ms, of which the device does 5
            tasks += [asyncio.create_task(ask()) for _ in range(25)]
            await asyncio.sleep(0.01)
        done = sum(await asyncio.gather(*tasks))
        took_s = time.monotonic() - began
        await batcher.close()
        assert len(refused_after) > len(tasks) / 2
        assert min(pauses) >= 1
        assert statistics.median(refused_after) < 0.01
        assert done * 100 > 0.3 * 50_000 * took_s, "the device stood still"

    asyncio.run(main())
