"""The pool on Ray: the engine's bits whoever asks and whatever dies, asleep and awake, with old weights and new."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.reward_pool.errors import (
    AsleepError,
    PolicyTokenizerError,
    PoolClosedError,
    PoolStartError,
    RewardInputError,
    WeightsUpdateError,
)
from cluster.reward_pool.pool import RewardActorPool
from serve_app.reward_model import CheckpointError, ConversationError, RewardModel, UnsupportedDeviceError
from tests.cluster.reward_pool import policies
from tests.cluster.reward_pool.checkpoints import reshaped, retrained
from tests.conftest import chat

WORDS = ("the", "sea", "is", "wide", "while", "rivers", "run", "to", "it")
Chats = list[list[dict[str, str]]]


@pytest.fixture(scope="module")
def chats() -> Chats:
    """300 candidates: 60 prompts with 5 responses each, of many lengths, the candidates of a prompt apart."""
    texts = [" ".join(WORDS[(place * step) % len(WORDS)] for step in range(1 + place % 90)) for place in range(300)]
    return [chat(texts[place % 60] + f" {place % 60}", f"{place} " + texts[place]) for place in range(300)]


@pytest.fixture(scope="module")
def expected(tiny: RewardModel, chats: Chats) -> list[float]:
    return tiny.get_scores(chats)


@pytest.fixture(scope="module")
def pool(local_ray: None, tiny: RewardModel) -> Iterator[RewardActorPool]:
    options: dict[str, Any] = {"policy_tokenizer": policies.chatml(tiny.folder), "name": "pool-of-tests"}
    with RewardActorPool("tiny", num_actors=2, dtype="float32", **options) as pool:
        yield pool
    with pytest.raises(PoolClosedError):
        pool.score([chat("Hi", "Hello")])
    pool.shutdown()


def pids(pool: RewardActorPool) -> list[int]:
    return [found.status.pid for found in pool.health() if found.status is not None]


def test_scores_are_the_engines(pool: RewardActorPool, chats: Chats, expected: list[float]) -> None:
    assert pool.score(chats) == expected
    assert pool.score(chats[::-1]) == expected[::-1]
    assert pool.score(chats[:1]) == expected[:1]
    assert pool.score([]) == []


def test_every_turn_has_the_engines_bits(pool: RewardActorPool, tiny: RewardModel) -> None:
    talks = [chat(*(f"{talk} {WORDS[place]} and so on" for place in range(2 * talk))) for talk in range(1, 5)]
    expected = [[turn.value for turn in tiny.score_turns(talk)] for talk in talks]
    assert pool.score_turns(talks) == expected
    assert pool.score_turns([[{"role": "user", "content": "Hi"}], *talks], on_error="null") == [None, *expected]
    with pytest.raises(ConversationError, match="item 1: no message has the role 'assistant'"):
        pool.score_turns([talks[0], [{"role": "user", "content": "Hi"}]])


def test_many_callers_at_once_each_get_their_own(pool: RewardActorPool, chats: Chats, expected: list[float]) -> None:
    async def one_each() -> list[Any]:
        return await asyncio.gather(*(pool.score_async([conversation]) for conversation in chats[:150]))

    assert asyncio.run(one_each()) == [[score] for score in expected[:150]]
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(pool.score, [chats[:150]] * 3)) == [expected[:150]] * 3

    async def on_a_running_loop() -> list[float | None]:
        return pool.score(chats[:3])

    assert asyncio.run(on_a_running_loop()) == expected[:3]


def test_texts_and_padded_ids(pool: RewardActorPool, chats: Chats, expected: list[float], tiny: RewardModel) -> None:
    policy = policies.chatml(tiny.folder)
    texts = [policy.apply_chat_template(conversation, tokenize=False) for conversation in chats[:8]]
    assert pool.score_text(texts) == expected[:8]
    batch = policy(texts, padding=True, return_tensors="pt", add_special_tokens=False, padding_side="left")
    rewards = pool.forward(batch["input_ids"], batch["attention_mask"])
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == expected[:8]
    broken = batch["attention_mask"].clone()
    broken[3] = 0
    assert pool.forward(batch["input_ids"], broken, on_error="null").isnan().tolist() == [
        place == 3 for place in range(8)
    ]
    with pytest.raises(RewardInputError, match="go together"):
        pool.forward(batch["input_ids"], batch["attention_mask"][:3])


def test_one_bad_item_is_named_or_null(pool: RewardActorPool, chats: Chats, expected: list[float]) -> None:
    batch: list[Any] = [*chats[:3], [{"role": "user", "content": 7}], *chats[3:5]]
    with pytest.raises(ConversationError, match="item 3: message 0: content is int"):
        pool.score(batch)
    assert pool.score(batch, on_error="null") == [*expected[:3], None, *expected[3:5]]


def test_other_processes_talk_to_the_same_actors(pool: RewardActorPool, chats: Chats, expected: list[float]) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def elsewhere(shared: RewardActorPool) -> tuple[int, list[float | None], list[int]]:
        return os.getpid(), shared.score(chats[:9]), pids(shared)

    pid, scores, theirs = ray.get(elsewhere.remote(pool), timeout=600)
    assert pid != os.getpid()
    assert scores == expected[:9]
    assert theirs == pids(pool)
    attached = RewardActorPool.attach("pool-of-tests")
    assert attached.score(chats[:9]) == expected[:9]
    with attached:
        pass
    assert pool.score(chats[:1]) == expected[:1]


def test_an_actor_killed_in_mid_batch_costs_nothing(
    pool: RewardActorPool, chats: Chats, expected: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    stale = pickle.loads(pickle.dumps(pool))
    before = pids(pool)
    os.kill(before[0], signal.SIGSTOP)  # it takes parts and does not finish them
    with ThreadPoolExecutor(1) as thread, caplog.at_level(logging.WARNING):
        scores = thread.submit(pool.score, chats)
        threading.Event().wait(0.5)
        os.kill(before[0], signal.SIGKILL)
        assert scores.result(timeout=600) == expected
    assert "reward actor 0 failed (ActorDiedError); its part of" in caplog.text
    assert "is asked for again" in caplog.text
    assert not any(conversation[1]["content"] in caplog.text for conversation in chats[90:])
    assert stale.score(chats) == expected
    until = time.monotonic() + 120
    while pool.health()[0].problem is not None:  # the other one may do all before the new one has its model
        assert time.monotonic() < until
        time.sleep(0.05)
    assert [(found.num_replaced, found.problem) for found in pool.health()] == [(1, None), (0, None)]


def test_asleep_it_refuses_and_awake_it_has_the_same_bits(
    pool: RewardActorPool, chats: Chats, expected: list[float]
) -> None:
    import ray

    pool.sleep()
    assert [found.status and found.status.is_asleep for found in pool.health()] == [True, True]
    with pytest.raises(AsleepError, match="wake"):
        pool.score(chats)
    ray.kill(pool._connection.member(1).handle)
    with pytest.raises(AsleepError):
        pool.score(chats)
    pool.wake()
    assert pool.score(chats) == expected


def test_new_weights_are_in_all_actors_or_in_none(
    pool: RewardActorPool, chats: Chats, expected: list[float], tiny: RewardModel, tmp_path: Path
) -> None:
    import ray

    with pytest.raises(WeightsUpdateError, match="reward actor 0: .*num_layers 5 -> 4; reward actor 1"):
        pool.update_weights(str(reshaped(tiny.folder, tmp_path / "other", num_hidden_layers=4)))
    assert pool.score(chats) == expected

    new = retrained(tiny.folder, tmp_path / "new")
    wanted = RewardModel.from_pretrained(str(new), device="cpu", dtype="float32")
    wanted_scores = [
        wanted.score_token_ids([tiny.tokenizer.encode(conversation)]).tolist()[0] for conversation in chats[:20]
    ]
    begun = threading.Thread(target=lambda: mixed.append(pool.score(chats)))
    mixed: list[list[float | None]] = []
    begun.start()
    version = pool.update_weights(str(new))
    begun.join(timeout=600)
    assert version.number == 1
    now = pool.score(chats)
    assert now[:20] == wanted_scores
    assert mixed[0] in (expected, now)
    ray.kill(pool._connection.member(0).handle)
    assert pool.score(chats) == now
    pool.update_weights("tiny")
    assert pool.score(chats) == expected


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "/no/such/model"}, CheckpointError, "does not exist"),
        ({"num_actors": 0}, RewardInputError, "positive"),
        ({"detached": True}, RewardInputError, "needs a name"),
        ({"device": "cpu", "num_gpus": 1}, RewardInputError, "num_gpus=1"),
        ({"num_gpus": 1.5}, RewardInputError, "a whole number of them"),
        ({"device": "cpu", "quantization": "fp8"}, UnsupportedDeviceError, "fp8 needs an NVIDIA GPU"),
        ({"num_gpus": 0, "quantization": "fp8"}, UnsupportedDeviceError, "the device is cpu"),
        ({"truncation": "middle"}, RewardInputError, "truncation"),
        ({"policy_tokenizer": "/no/such"}, PolicyTokenizerError, "/no/such"),
        ({"name": "pool-of-tests"}, PoolStartError, "attach"),
        ({"num_gpus": 0.5, "start_timeout_s": 0.5}, PoolStartError, "0.5 GPUs each; free are"),
    ],
)
def test_a_pool_that_cannot_start_says_why(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RewardActorPool(**options)


@pytest.mark.usefixtures("pool")
def test_there_is_no_pool_of_another_name() -> None:
    with pytest.raises(PoolClosedError, match="'nobody'"):
        RewardActorPool.attach("nobody")
