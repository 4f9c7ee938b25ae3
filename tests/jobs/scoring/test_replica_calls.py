"""Calls to replicas that are busy, die, change or fail, with replicas that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs.errors import ScorerError
from jobs.scoring import replica_calls
from jobs.scoring.replica_calls import CallGate, ReplicaCalls
from jobs.scoring.stage import DeadRowError
from serve_app.batching.errors import ForwardError
from serve_app.batching.wire import Refusal, ScoreReply, TokenBatch
from serve_app.reward_model import NonFiniteScoreError

POISON = 666
Answer = Callable[[TokenBatch], ScoreReply]


def lengths_of(batch: TokenBatch) -> ScoreReply:
    """A sequence's score is its length."""
    return ScoreReply(batch.lengths.astype(np.float32))


def refusing(reason: Any) -> Answer:
    return lambda batch: ScoreReply.without(Refusal(reason, 0))


def failing(batch: TokenBatch) -> ScoreReply:
    return ScoreReply.without(ForwardError("Boom", ""))


def dying(batch: TokenBatch) -> ScoreReply:
    from ray.exceptions import ActorDiedError

    raise ActorDiedError


def dying_of_poison(batch: TokenBatch) -> ScoreReply:
    return dying(batch) if POISON in batch.ids else lengths_of(batch)


class Replicas:
    """A Serve handle's stand-in: answers in turn, the last one for ever, once `num_first` calls are under way."""

    def __init__(self, *answers: Answer, num_first: int = 1) -> None:
        self.answers = list(answers)
        self.num_first = num_first
        self.calls = 0
        self.under_way: list[bool] = []
        self.overlaps = 0
        """Calls that were under way beside a poisoned one."""
        self.score = SimpleNamespace(remote=lambda batch, key: asyncio.ensure_future(self._score(batch, key)))

    async def _score(self, batch: TokenBatch, key: str) -> ScoreReply:
        assert key == "key"
        self.calls += 1
        is_poisoned = POISON in batch.ids
        self.overlaps += len(self.under_way) if is_poisoned else any(self.under_way)
        self.under_way.append(is_poisoned)
        try:
            while len(self.under_way) < self.num_first:
                await asyncio.sleep(0.001)
            self.num_first = 1
            await asyncio.sleep(0.005)  # in which more would come
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            return answer(batch)
        finally:
            self.under_way.remove(is_poisoned)


def on_a_card(batch: TokenBatch) -> ScoreReply:
    return replace(lengths_of(batch), processor="a card")


@pytest.fixture(autouse=True)
def _no_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_calls, "num_replicas", lambda app, deployment: 1)
    monkeypatch.setattr(replica_calls, "PAUSE_S", 0.0)


def calls(replicas: Replicas) -> ReplicaCalls:
    return ReplicaCalls("app", "model", "key", num_callers=1, handle=replicas)


def sequences(*lengths: int) -> list[list[int]]:
    return [[1] * length for length in lengths]


def outcomes(replicas: Replicas, asked: Sequence[list[int]]) -> list[Any]:
    return calls(replicas).submit(asked).result(120)


@pytest.mark.parametrize("trouble", [refusing("overloaded"), refusing("unavailable"), failing, dying])
def test_what_passes_is_asked_again(trouble: Answer) -> None:
    assert outcomes(Replicas(trouble, lengths_of), sequences(3, 1, 2)) == [[3.0], [1.0], [2.0]]


def test_one_bad_row_has_its_error_and_its_neighbours_their_scores() -> None:
    def one_bad(batch: TokenBatch) -> ScoreReply:
        return ScoreReply(batch.lengths.astype(np.float32), {1: NonFiniteScoreError("nan")})

    first, second, third = outcomes(Replicas(one_bad), sequences(3, 1, 2))
    assert (first, third) == ([3.0], [2.0])
    assert isinstance(second, NonFiniteScoreError)


def test_it_is_known_what_answers_were_computed_on() -> None:
    asked = calls(Replicas(on_a_card))
    assert asked.processors == set()
    asked.submit(sequences(3)).result()
    assert asked.processors == {"a card"}


def test_another_model_stops_the_job() -> None:
    one = calls(Replicas(lengths_of, refusing("another_model")))
    assert one.submit(sequences(1)).result(120) == [[1.0]]
    with pytest.raises(ScorerError, match="serves another model than when the job began"):
        one.submit(sequences(1)).result(120)


def test_a_model_that_fails_for_good_stops_the_job() -> None:
    replicas = Replicas(failing)
    with pytest.raises(ScorerError, match="fails on 2 sequences"):
        outcomes(replicas, sequences(1, 2))
    assert replicas.calls == replica_calls.MAX_FAILURES


def test_replicas_that_take_on_nothing_stop_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_calls, "NO_PROGRESS_S", 0.2)
    with pytest.raises(ScorerError, match="took on nothing for"):
        outcomes(Replicas(refusing("overloaded")), sequences(1))


def test_the_row_that_kills_replicas_is_found_and_asked_for_alone() -> None:
    replicas = Replicas(dying_of_poison, num_first=replica_calls.CALLS_PER_REPLICA)
    one = calls(replicas)
    guilty = 5
    parts = [sequences(*range(1, 9)) for _ in range(12)]
    parts[2][guilty] = [POISON]
    answers = [one.submit(part) for part in parts]
    found = [answer.result(120) for answer in answers]
    assert isinstance(found[2][guilty], DeadRowError)
    found[2][guilty] = [6.0]
    assert found == [[[float(length)] for length in range(1, 9)]] * 12
    assert replicas.overlaps == 2  # the two others that were under way the first time, and none later


def test_no_more_calls_are_under_way_than_the_replicas_take(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0

    def watched(batch: TokenBatch) -> ScoreReply:
        nonlocal most
        most = max(most, len(replicas.under_way))
        return lengths_of(batch)

    monkeypatch.setattr(replica_calls, "num_replicas", lambda app, deployment: 2)
    replicas = Replicas(watched, num_first=2 * replica_calls.CALLS_PER_REPLICA)
    one = calls(replicas)
    assert [answer.result(120) for answer in [one.submit(sequences(1)) for _ in range(40)]] == [[[1.0]]] * 40
    assert most == 2 * replica_calls.CALLS_PER_REPLICA


def test_who_has_to_be_alone_waits_and_is() -> None:
    async def scene() -> list[str]:
        gate, seen = CallGate(2), []

        async def lone() -> None:
            async with gate.alone():
                seen.append(f"alone with {gate.num_inside}")
                await asyncio.sleep(0.01)
                seen.append("alone done")

        async def late() -> None:
            async with gate.shared():
                seen.append("late")

        async with AsyncExitStack() as stack:
            await stack.enter_async_context(gate.shared())
            tasks = [asyncio.ensure_future(lone()), asyncio.ensure_future(lone())]
            await asyncio.sleep(0.01)
            tasks.append(asyncio.ensure_future(late()))
            await asyncio.sleep(0.01)
            seen.append("first leaves")
        await asyncio.gather(*tasks)
        return seen

    expected = ["first leaves", *["alone with 0", "alone done"] * 2, "late"]
    assert asyncio.run(scene()) == expected
