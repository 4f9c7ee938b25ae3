"""`/v1/chat/completions` as ms-swift serves a reward model: the conversation's score is the content of the answer.

ms-swift's `InferClient` and any chat client of a reward model send the conversation with the response as its last
message, and read `choices[0].message.content`.
"""

from __future__ import annotations

import time
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from serve_app.web.dialects.dialect import Answered, Asked, Body, ChatMessage, Dialect, Reader
from serve_app.web.dialects.vllm import TokenUsage
from serve_app.web.service import ApiError


class ChatCompletionRequest(Body):
    """One conversation. What steers generation is ignored: nothing is generated."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "examples": [
                {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]}
            ]
        },
    )

    messages: list[ChatMessage] = Field(description="The last message is the assistant's, which is scored.")
    stream: bool | None = Field(default=None, description="true is refused.")
    n: int | None = Field(default=None, description="1 or none: there is one score.")
    tools: list[Any] | None = Field(default=None, description="Refused: tools cannot be rendered.")


class AnswerMessage(BaseModel):
    """The score as text."""

    role: Literal["assistant"] = "assistant"
    content: str = Field(description="The raw logit, in decimal.")


class Choice(BaseModel):
    """The only choice."""

    index: int = 0
    message: AnswerMessage
    finish_reason: Literal["stop"] = "stop"


class ChatCompletion(BaseModel):
    """The form of OpenAI's chat API."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: TokenUsage


def _ask(reader: Reader, body: ChatCompletionRequest) -> Asked:
    for name in ("stream", "tools"):
        if getattr(body, name):
            raise ApiError(422, f"{name!r} cannot be honoured: the answer is one score", "unsupported", name)
    if body.n not in (None, 1):
        raise ApiError(422, "'n' is 1: a conversation has one score", "unsupported", "n")
    if body.messages and body.messages[-1].role != "assistant":
        text = "the last message, which is scored, is the assistant's; a reward model writes no answer"
        raise ApiError(422, text, "invalid_conversation", f"messages[{len(body.messages) - 1}].role")
    return reader.messages(body.messages, field="messages")


def _answer(body: ChatCompletionRequest, answered: Answered) -> dict[str, Any]:
    (value,) = answered.values()
    message = {"role": "assistant", "content": repr(value)}
    return {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": answered.model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": answered.usage,
    }


DIALECTS = (
    Dialect(
        paths=["/v1/chat/completions"],
        summary="A score as the content of a chat completion",
        description="Scores one conversation, whose last message is the assistant's. The content of the answer is the "
        "raw logit as text.",
        body=ChatCompletionRequest,
        answers=ChatCompletion,
        ask=_ask,
        answer=_answer,
    ),
)
