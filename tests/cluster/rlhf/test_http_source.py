"""An endpoint as a source, over real HTTP."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from cluster.rlhf.errors import RewardSourceError
from cluster.rlhf.sources import HttpRewardSource, as_reward_source, reward_source_from_environment
from serve_app.reward_model import ConversationError
from tests.cluster.rlhf.conftest import turns
from tests.serve_app.scripted_server import Reply, Request, refusal, serving

BAD = "bad"


def answer(request: Request) -> Reply:
    """A score is the length of the response; one of `BAD` is refused, as the endpoint does."""
    if request.headers.get("Authorization") not in (None, "Bearer key"):
        return refusal(401, "another key")
    contents = [conversation[-1]["content"] for conversation in request.body["conversations"]]
    if BAD in contents:
        return refusal(
            422, "over the limit", code="conversation_too_long", param=f"conversations[{contents.index(BAD)}]"
        )
    results = [
        {"index": place, "score": len(content), "num_tokens": 1, "truncated": False}
        for place, content in enumerate(contents)
    ]
    return Reply({"model": "tiny", "usage": {"prompt_tokens": 1}, "results": results})


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYWARD_API_KEY", raising=False)


def test_scores_come_in_order_also_after_pickling_and_in_new_event_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    conversations = [turns("a", "bcd"), turns("a", "b"), turns("a", "bc")]
    with serving(answer) as server:
        monkeypatch.setenv("RAYWARD_URL", server.url)
        monkeypatch.delenv("RAYWARD_POOL", raising=False)
        source = reward_source_from_environment()
        assert isinstance(source, HttpRewardSource)
        assert source.score(conversations) == [3.0, 1.0, 2.0]
        copied = pickle.loads(pickle.dumps(source))
        for _ in range(2):  # as ms-swift asks: a loop for each step
            assert asyncio.run(copied.score_async(conversations)) == [3.0, 1.0, 2.0]
        assert source.score([]) == []
        copied.close()
        source.close()


def test_a_refused_conversation_is_named_or_has_none() -> None:
    conversations = [turns("a", "b"), turns("a", BAD), turns("a", "bc"), turns("a", BAD), turns("a", "bcd")]
    with serving(answer) as server:
        source = HttpRewardSource(server.url)
        with pytest.raises(ConversationError, match="item 1: the endpoint refuses it: over the limit"):
            source.score(conversations)
        assert source.score(conversations, on_error="null") == [1.0, None, 2.0, None, 3.0]
        assert source.score(conversations[1:2], on_error="null") == [None]
        source.close()


def test_no_endpoint_another_key_and_no_address_are_typed_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardSourceError, match="no address"):
        as_reward_source("tiny")
    monkeypatch.setenv("RAYWARD_API_KEY", "wrong")
    with serving(answer) as server:
        source = HttpRewardSource(server.url)
        with pytest.raises(RewardSourceError, match="another key"):
            source.score([turns("a", "b")])
        assert b"wrong" not in pickle.dumps(source)
        source.close()
    source = HttpRewardSource(server.url, timeout_s=0.2)
    with pytest.raises(RewardSourceError, match="gives no rewards"):
        source.score([turns("a", "b")])
    source.close()
