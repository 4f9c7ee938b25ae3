"""What the dialects that look like OpenAI's API share: rendered texts or messages in, token counts out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from serve_app.reward_model import Conversation, ConversationError, Message, Score
from serve_app.web.service import ApiError, ScoringService

EXAMPLE_TEXT = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"

Texts: TypeAlias = str | list[str]


class ContentPart(BaseModel):
    """A piece of a message's content; only `type` `"text"` can be scored."""

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """A message as OpenAI's chat API has it. `name` is ignored, as the models' templates do."""

    role: str
    content: str | list[ContentPart]
    name: str | None = None
    tool_calls: list[Any] | None = None


class InputOrMessages(BaseModel):
    """A request with either whole rendered texts or one conversation."""

    model: str | None = Field(default=None, description="Which of the served models; without it the first.")
    input: Texts | None = Field(
        default=None,
        description="Rendered text, or a list of them: ChatML or the model's own chat template, with or without its "
        "BOS and reward token.",
    )
    messages: list[ChatMessage] | None = Field(
        default=None, description="One conversation instead of `input`; its last message is the one scored."
    )
    use_activation: bool | None = Field(
        default=None,
        description="true: the logistic sigmoid of the score. Off by default, unlike in vLLM: scores are raw logits.",
    )
    user: str | None = Field(default=None, description="Ignored.")
    priority: int | None = Field(default=None, description="Ignored.")
    request_id: str | None = Field(default=None, description="Ignored.")
    add_special_tokens: bool | None = Field(default=None, description="Ignored: there is always one BOS.")
    add_generation_prompt: bool | None = Field(default=None, description="Ignored: the last message is scored.")

    model_config = ConfigDict(extra="ignore")


class TokenUsage(BaseModel):
    """Tokens read, BOS and reward token included; a reward model writes none."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0

    @classmethod
    def of(cls, scores: Sequence[Score]) -> TokenUsage:
        num_tokens = sum(score.num_tokens for score in scores)
        return cls(prompt_tokens=num_tokens, total_tokens=num_tokens)


def activated(score: Score, use_activation: bool | None) -> float:
    """The raw score, or with `use_activation` its logistic sigmoid, which does not overflow for any finite score."""
    if not use_activation:
        return score.value
    tail = math.exp(-abs(score.value))
    return 1 / (1 + tail) if score.value >= 0 else tail / (1 + tail)


def text_or_messages(service: ScoringService, model: str, body: InputOrMessages) -> list[Conversation]:
    """The conversations of a request. Raises `ApiError` 422 unless it has exactly one of `input` and `messages`."""
    if body.input is not None and body.messages is None:
        return read_texts(service, model, body.input, field="input")
    if body.messages is not None and body.input is None:
        return [checked(parse_messages(body.messages, field="messages"), field="messages")]
    raise ApiError(422, "send exactly one of 'input' and 'messages'", "exactly_one_field", "input")


def read_texts(service: ScoringService, model: str, texts: Texts, *, field: str) -> list[Conversation]:
    """Each rendered text as a conversation; `ApiError` names the first that cannot be read by its place in `field`."""
    params = text_params(texts, field=field)
    each = [texts] if isinstance(texts, str) else texts
    return [_read_text(service, model, text, param) for text, param in zip(each, params, strict=True)]


def text_params(texts: Texts, *, field: str) -> list[str]:
    """What an error calls each of `texts`: the field, or its places."""
    return [field] if isinstance(texts, str) else [f"{field}[{place}]" for place in range(len(texts))]


def input_params(body: InputOrMessages) -> list[str]:
    """The same for the conversations of `text_or_messages`."""
    return ["messages"] if body.input is None else text_params(body.input, field="input")


def _read_text(service: ScoringService, model: str, text: str, param: str) -> Conversation:
    try:
        return service.read_text(model, text)
    except ApiError as error:
        raise replace(error, param=param) from error


def parse_messages(messages: Sequence[ChatMessage], *, field: str) -> list[Message]:
    """Messages with their content as one string. Raises `ApiError` 422 for what has no place in a rendered text."""
    return [Message(message.role, _content(message, f"{field}[{at}]")) for at, message in enumerate(messages)]


def _content(message: ChatMessage, path: str) -> str:
    if message.tool_calls:
        raise ApiError(422, "tool calls cannot be scored", "unsupported_content", f"{path}.tool_calls")
    if isinstance(message.content, str):
        return message.content
    for at, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            part_path = f"{path}.content[{at}]"
            raise ApiError(422, f"{part_path} is no text part; only text is scored", "unsupported_content", part_path)
    return "".join(part.text or "" for part in message.content)


def checked(messages: Sequence[Message], *, field: str) -> Conversation:
    """A conversation of `messages`. Raises `ApiError` 422 if it is empty or has text that is not valid Unicode."""
    try:
        return Conversation.parse(messages)
    except ConversationError as error:
        raise ApiError(422, f"{field}: {error}", "invalid_conversation", field) from error
