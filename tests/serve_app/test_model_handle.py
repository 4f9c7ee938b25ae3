"""How the ingress asks replicas: parts, retries and errors, with replicas that fail as they are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayError

from serve_app import model_handle
from serve_app.batching.errors import ForwardError
from serve_app.batching.wire import Refusal, ScoreReply, TokenBatch
from serve_app.config import ModelConfig
from serve_app.model_handle import MAX_PART_RETRIES, PART_TOKENS, PARTS_AT_ONCE, ModelHandle
from serve_app.reward_model import (
    Conversation,
    DeviceMemoryError,
    NonFiniteScoreError,
    RewardModel,
    Score,
    ScoringError,
)
from serve_app.web.service import ApiError, deadline_in
from tests.conftest import chat
from tests.reward_model import classifiers, stepwise

Answer = Callable[[TokenBatch], ScoreReply]


def lengths(request: TokenBatch) -> ScoreReply:
    """A sequence's score is its length."""
    return ScoreReply(request.lengths.astype(np.float32))


def failing(error: ScoringError) -> Answer:
    """The second sequence has `error`."""
    return lambda request: ScoreReply(request.lengths.astype(np.float32), {1: error})


def refusing(refusal: Refusal) -> Answer:
    return lambda request: ScoreReply.without(refusal)


def dying(request: TokenBatch) -> ScoreReply:
    raise ActorDiedError


class Replicas:
    """A Serve handle's stand-in: answers in turn, the last one for ever."""

    def __init__(self, *answers: Answer, delay_s: float = 0.0) -> None:
        self.answers = list(answers)
        self.delay_s = delay_s
        self.requests: list[TokenBatch] = []
        self.timeouts: list[float | None] = []
        self.under_way = self.most_under_way = 0
        self.score = SimpleNamespace(remote=lambda *asked, **how: asyncio.ensure_future(self._score(*asked, **how)))
        self.ready = SimpleNamespace(remote=self._ready)

    async def _score(self, request: TokenBatch, *, timeout_s: float | None) -> ScoreReply:
        self.requests.append(request)
        self.timeouts.append(timeout_s)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.delay_s)
            return (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])(request)
        finally:
            self.under_way -= 1

    async def _ready(self) -> bool:
        self.answers[0](TokenBatch.of([[1]]))
        return True


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_handle, "RETRY_PAUSE_S", 0.0)


def handle(replicas: Replicas, **options: Any) -> ModelHandle:
    config = ModelConfig.model_validate({"model": "tiny"} | options)
    return ModelHandle(config, replicas, ThreadPoolExecutor(1))  # type: ignore[arg-type]


def score(replicas: Replicas, conversations: Sequence[Any], *, model: str = "tiny", **options: Any) -> list[Score]:
    asked = {"truncation": "error", "max_tokens": None, "params": None} | options
    return asyncio.run(handle(replicas, model=model).score(conversations, **asked))


WHY = "Why is the water of all the seas as salt as it is?"
CHATS = [chat(WHY, "Because."), chat("Who?", "Nobody knows it."), chat(WHY, "I do not know.")]


def test_those_with_one_prompt_stand_together_and_scores_are_in_order(tiny: RewardModel) -> None:
    replicas = Replicas(lengths)
    scores = score(replicas, CHATS)
    ids = [tiny.tokenizer.encode(conversation) for conversation in CHATS]
    assert [item.value for item in scores] == [item.num_tokens for item in scores] == [len(each) for each in ids]
    assert sorted(replicas.requests[0].lists()) == sorted(ids)
    assert replicas.requests[0].lists()[1] in (ids[0], ids[2])


def test_turns_travel_once_and_keep_their_bits(tiny: RewardModel) -> None:
    """8 answers of one conversation: each id crosses to the replica once."""
    talk = chat(*(f"{place} " + "and on it goes " * 6 for place in range(16)))
    turns = Conversation.parse(talk).turns()
    replicas = Replicas(lambda request: ScoreReply.of(tiny.scorer.outputs(request.lists())))
    assert score(replicas, turns) == tiny.score_turns(talk)
    (request,) = replicas.requests
    assert len(request.ids) < tiny.score(turns)[-1].num_tokens + 2 * len(turns)


def test_steps_of_a_process_reward_model(tmp_path: Path, tiny: RewardModel) -> None:
    model = RewardModel.from_pretrained(stepwise.KINDS["qwen"].write(tmp_path), device="cpu", dtype="float32")
    replicas = Replicas(lambda request: ScoreReply.of(model.scorer.outputs(request.lists())))
    served = handle(replicas, model=str(tmp_path), max_tokens=200)
    prompt = [{"role": "user", "content": stepwise.QUESTION}]
    found = asyncio.run(served.score_steps([prompt] * 2, stepwise.ANSWERS))
    assert [list(scores.values) for scores in found] == [model.score_steps(prompt, own) for own in stepwise.ANSWERS]
    assert len(replicas.requests[0].ids) < sum(scores.num_tokens for scores in found)
    for prompts, steps, param in (
        ([prompt, chat("a", "b")], [["a"], ["b"]], "conversations[1]"),
        ([prompt], [["so on " * 200]], "conversations[0]"),
    ):
        with pytest.raises(ApiError) as raised:
            asyncio.run(served.score_steps(prompts, steps))
        assert (raised.value.status, raised.value.param) == (422, param)
    with pytest.raises(ApiError, match="use score_steps"):
        score(replicas, CHATS[:1], model=str(tmp_path))
    with pytest.raises(ApiError, match="tiny scores conversations, and no steps"):
        asyncio.run(handle(replicas).score_steps([prompt], [["a"]]))


def test_attributes_have_their_names_in_each_score(tmp_path: Path) -> None:
    replicas = Replicas(lambda request: ScoreReply.of([[0.5, 1.0, 2.0, 3.0, 4.0, 5.0]] * request.num_sequences))
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    options = {"truncation": "error", "max_tokens": None, "params": None}
    served = handle(replicas, model=str(classifiers.write_urm(tmp_path)))
    (found,) = asyncio.run(served.score(CHATS[:1], **options))  # type: ignore[arg-type]
    assert (found.value, found.attributes) == (0.5, dict(zip(names, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True)))


def test_a_large_list_goes_in_parts_a_few_at_a_time(tiny: RewardModel) -> None:
    conversations = [chat(f"Question {place}?", "word " * 300) for place in range(400)]
    replicas = Replicas(lengths, delay_s=0.01)
    scores = score(replicas, conversations)
    assert [item.value for item in scores] == [len(tiny.tokenizer.encode(each)) for each in conversations]
    assert all(request.lengths.sum() <= PART_TOKENS for request in replicas.requests)
    assert len(replicas.requests) > PARTS_AT_ONCE == replicas.most_under_way


def test_a_large_list_is_tokenised_while_its_beginning_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_handle, "ENCODED_AHEAD", 2)
    replicas = Replicas(lengths)
    served = handle(replicas)
    encode = served.tokenizer.encode_batch
    slices: list[int] = []

    def waits_for_the_slices_before(items: Sequence[Any], **how: Any) -> Any:
        until = time.monotonic() + 60
        while len(replicas.requests) < len(slices):
            assert time.monotonic() < until, "nothing was sent while this was tokenised"
            time.sleep(0.001)
        slices.append(len(items))
        return encode(items, **how)

    monkeypatch.setattr(served.tokenizer, "encode_batch", waits_for_the_slices_before)
    asked = [chat(f"Question {place % 2}?", "so " * place) for place in range(1, 6)]
    scores = asyncio.run(served.score(asked, truncation="error", max_tokens=None, params=None))
    assert slices == [2, 2, 1]
    assert [item.value for item in scores] == [item.num_tokens for item in scores]
    assert sorted(item.num_tokens for item in scores) == [item.num_tokens for item in scores], "in the order asked for"


def test_the_first_of_a_large_list_that_cannot_be_encoded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_handle, "ENCODED_AHEAD", 2)
    long = "because " * 40_000
    # Those with one prompt are tokenised together: the last one before the second.
    asked = [chat("Why?", "So."), chat("Who?", long), chat("What?", "It."), chat("Why?", long)]
    replicas = Replicas(lengths, delay_s=30.0)
    with pytest.raises(ApiError) as raised:
        score(replicas, asked)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "conversations[1]")
    assert not replicas.requests
    replicas = Replicas(lengths, delay_s=30.0)
    with pytest.raises(ApiError) as raised:
        score(replicas, [chat("Why?", "So."), chat("Why?", "It is."), chat("Who?", long)])
    assert raised.value.param == "conversations[2]"
    assert (len(replicas.requests), replicas.under_way) == (1, 0), "what was sent is cancelled"


@pytest.mark.usefixtures("no_pause")
def test_a_dead_replica_is_asked_for_again_twice_and_no_more() -> None:
    replicas = Replicas(*[dying] * MAX_PART_RETRIES, lengths)
    assert len(score(replicas, CHATS)) == 3
    replicas = Replicas(dying)
    with pytest.raises(ApiError) as raised:
        score(replicas, CHATS)
    assert (raised.value.status, raised.value.code) == (503, "unavailable")
    assert len(replicas.requests) == 1 + MAX_PART_RETRIES


@pytest.mark.usefixtures("no_pause")
def test_a_replica_that_closes_is_asked_for_elsewhere() -> None:
    assert len(score(Replicas(refusing(Refusal("unavailable")), lengths), CHATS)) == 3


def test_overload_is_told_at_once() -> None:
    replicas = Replicas(refusing(Refusal("overloaded", 7)))
    with pytest.raises(ApiError) as raised:
        score(replicas, CHATS)
    assert (raised.value.status, raised.value.code, raised.value.retry_after_s) == (503, "overloaded", 7)
    assert len(replicas.requests) == 1


def test_a_request_that_was_taken_on_waits_for_room_for_its_other_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    conversations = [chat(f"Question {place}?", "word " * 300) for place in range(60)]
    replicas = Replicas(lengths, refusing(Refusal("overloaded", 0)), lengths)
    assert len(score(replicas, conversations)) == 60


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NonFiniteScoreError("the score is nan"), 422, "score_not_finite"),
        (DeviceMemoryError("too much"), 422, "does_not_fit_in_memory"),
    ],
)
def test_an_error_of_one_conversation_names_it(error: ScoringError, status: int, code: str, tiny: RewardModel) -> None:
    replicas = Replicas(failing(error))
    with pytest.raises(ApiError) as raised:
        score(replicas, CHATS)
    second = [tiny.tokenizer.encode(each) for each in CHATS].index(replicas.requests[0].lists()[1])
    assert second in (0, 2)  # the two that have one prompt
    assert (raised.value.status, raised.value.code, raised.value.param) == (status, code, f"conversations[{second}]")


@pytest.mark.usefixtures("no_pause")
def test_a_request_that_fails_on_one_replica_is_asked_for_elsewhere() -> None:
    def broken(request: TokenBatch) -> ScoreReply:
        return ScoreReply.without(ForwardError("E", "secret"))

    assert len(score(Replicas(broken, lengths), CHATS)) == 3
    with pytest.raises(ApiError) as raised:
        score(Replicas(broken), CHATS)
    assert (raised.value.status, raised.value.code) == (503, "forward_failed")
    assert "secret" not in raised.value.message


def test_the_other_parts_of_a_refused_request_are_cancelled() -> None:
    conversations = [chat(f"Question {place}?", "word " * 300) for place in range(60)]

    class SlowAfterRefusal(Replicas):
        cancelled = 0

        async def _score(self, request: TokenBatch, *, timeout_s: float | None) -> ScoreReply:
            self.requests.append(request)
            if len(self.requests) == 1:
                await asyncio.sleep(0.05)
                return refusing(Refusal("overloaded"))(request)
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            raise AssertionError("nobody wants this")

    replicas = SlowAfterRefusal(lengths)
    with pytest.raises(ApiError, match="more work"):
        score(replicas, conversations)
    assert replicas.cancelled == len(replicas.requests) - 1 > 0


def test_errors_name_the_field_that_the_route_knows() -> None:
    long = chat("Why?", "because " * 40_000)
    for conversations, code in (
        ([CHATS[0], long], "context_length_exceeded"),
        ([CHATS[0], []], "invalid_conversation"),
    ):
        with pytest.raises(ApiError) as raised:
            score(Replicas(lengths), conversations, params=["first", "second"])
        assert (raised.value.status, raised.value.code, raised.value.param) == (422, code, "second")


def test_the_deadline_travels_with_the_request() -> None:
    replicas = Replicas(lengths)
    with deadline_in(3600.0):
        score(replicas, CHATS)
    score(replicas, CHATS)
    assert replicas.timeouts[0] is not None
    assert 3000.0 < replicas.timeouts[0] <= 3600.0
    assert replicas.timeouts[1] is None


def test_ready() -> None:
    def unready(request: TokenBatch) -> ScoreReply:
        raise RayError

    assert asyncio.run(handle(Replicas(lengths)).ready())
    assert not asyncio.run(handle(Replicas(unready)).ready())
    assert asyncio.run(handle(Replicas(unready), min_replicas=0, max_replicas=2).ready())


def test_each_conversation_has_its_own_outcome() -> None:
    """What cannot be read, is too long or has no finite score costs its own place, and is not sent to a replica."""
    unread = ApiError(400, "unreadable", "unreadable_text", "query[1]")
    asked: list[Any] = [CHATS[0], unread, chat("Why?", "word " * 9000), CHATS[1], []]
    replicas = Replicas(lengths)
    found = asyncio.run(
        handle(replicas, max_tokens=500).outcomes(
            asked, truncation=None, max_tokens=None, params=[f"query[{n}]" for n in range(5)]
        )
    )
    assert [type(each) for each in found] == [Score, ApiError, ApiError, Score, ApiError]
    assert found[1] is unread
    named = [(each.param, each.code) for each in found if isinstance(each, ApiError)]
    assert named[1:] == [("query[2]", "context_length_exceeded"), ("query[4]", "invalid_conversation")]
    assert len(replicas.requests[0].lists()) == 2
    errors = [unread, unread]
    assert asyncio.run(handle(replicas).outcomes(errors, truncation=None, max_tokens=None, params=None)) == errors


def test_the_models_truncation_and_length_are_the_default(tiny: RewardModel) -> None:
    long = chat("word " * 50, "word")
    short = handle(Replicas(lengths), max_tokens=40)
    assert short.max_tokens == 40
    options: dict[str, Any] = {"truncation": None, "max_tokens": None, "params": None}
    with pytest.raises(ApiError, match="40"):
        asyncio.run(short.score([long], **options))
    for truncation in ("left", "right"):
        cutting = handle(Replicas(lengths), max_tokens=40, truncation=truncation)
        (score,) = asyncio.run(cutting.score([long], **options))
        assert (score.truncated, score.num_tokens) == (True, 40)
        with pytest.raises(ApiError, match="40"):
            asyncio.run(cutting.score([long], **options | {"truncation": "error"}))
        (score,) = asyncio.run(cutting.score([long], **options | {"truncation": "right", "max_tokens": 10}))
        assert score.num_tokens == 10
        (score,) = asyncio.run(cutting.score([long], **options | {"max_tokens": 1000}))
        assert score.num_tokens == 40
