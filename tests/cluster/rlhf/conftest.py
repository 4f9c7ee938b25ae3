"""Sources of rewards for the adapters: one that can be foreseen, and the embedded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from cluster.rlhf import rollouts
from cluster.rlhf.sources import Messages, OnError
from serve_app.reward_model import ConversationError

TOO_LONG = "too long"


class RecordingSource:
    """A conversation's score is the length of its response; keeps what it is asked and the references. Pickles."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.references: list[str | None] = []

    def score(self, conversations: Sequence[Messages], *, on_error: OnError = "raise") -> list[float | None]:
        scores: list[float | None] = []
        for conversation in conversations:
            messages = [*(conversation["messages"] if isinstance(conversation, Mapping) else conversation)]
            self.references.append(conversation["reference"] if isinstance(conversation, Mapping) else None)
            self.asked.append([dict(message) for message in messages])
            failed = messages[-1]["content"] == TOO_LONG
            if failed and on_error == "raise":
                raise ConversationError("over the limit")
            scores.append(None if failed else float(len(messages[-1]["content"])))
        return scores

    async def score_async(
        self, conversations: Sequence[Messages], *, on_error: OnError = "raise"
    ) -> list[float | None]:
        return self.score(conversations, on_error=on_error)


@pytest.fixture
def source() -> RecordingSource:
    return RecordingSource()


@pytest.fixture
def named_source(monkeypatch: pytest.MonkeyPatch) -> RecordingSource:
    """The source that the environment or a trainer's configuration names, whatever that is."""
    named = RecordingSource()
    monkeypatch.setattr(rollouts, "reward_source_from_environment", lambda: named)
    monkeypatch.setattr(rollouts, "as_reward_source", lambda url: named)
    return named


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages of `contents`, user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]


def chatml(messages: Sequence[dict[str, str]], *, opened: bool = True) -> str:
    """Messages as a ChatML policy's template renders a prompt."""
    text = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return text + "<|im_start|>assistant\n" * opened
