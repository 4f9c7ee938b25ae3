"""What trainers hand over -> conversations: prompts and responses as messages, plain text or rendered text.

A prompt is a list of messages, a text that a chat template rendered (it opens a turn), or else what a user typed. A
response is text or messages. Inside a response special tokens stay text: it is the policy's, and one that could open
turns would choose its own prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from cluster.reward_pool.policy_text import PolicyText, without_thinking
from serve_app.reward_model import Conversation, ConversationError, Message, ScoringError
from serve_app.reward_model.rendered_text import RenderedTextReader, opens_turn, without_ending

__all__ = ["RolloutReader", "Turns"]

Turns: TypeAlias = "str | Sequence[Mapping[str, Any]]"
"""Text, or messages with `role` and `content`."""
REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")


class RolloutReader:
    """Makes conversations of a trainer's prompts and responses. Pickles.

    Args:
        policy_tokenizer: the policy's tokenizer, or its folder or Hugging Face id. It is needed for rendered text
            other than ChatML; with it, the system prompt that its template adds unasked is left out too.
        strip_thinking: leave out of responses what stands before `</think>`; without it that is scored as text.
    """

    def __init__(self, policy_tokenizer: Any = None, *, strip_thinking: bool = False) -> None:
        self.policy_tokenizer = policy_tokenizer
        self.strip_thinking = strip_thinking

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("policy_tokenizer", "strip_thinking")}

    def conversation(self, prompt: Turns, response: Turns) -> list[dict[str, str]]:
        """The conversation of one prompt and its response.

        A prompt that ends in an assistant's turn, such as an opened one, is continued by the response.

        Raises:
            RenderedTextError: the prompt looks rendered and cannot be read.
            ConversationError: a message has more to it than text.
        """
        messages = self._prompt(prompt)
        answer = self._response(response)
        if messages and messages[-1]["role"] == answer[0]["role"] == "assistant":
            opened = messages.pop()
            answer[0] = _message("assistant", opened["content"] + answer[0]["content"])
        return [*messages, *answer[:-1], self._without_thinking(answer[-1])]

    def read(self, text: str) -> list[dict[str, str]]:
        """The conversation of a whole rendered text. Special tokens delimit turns in it, also the policy's own.

        Raises:
            RenderedTextError: it is neither ChatML nor rendered by the policy's template.
        """
        *prompt, last = self._read(text)
        return [*prompt, self._without_thinking(last)]

    def read_ids(self, token_ids: Sequence[int]) -> list[dict[str, str]]:
        """The conversation of a whole sequence of the policy's ids without padding; needs `policy_tokenizer`.

        Raises:
            ConversationError, TokenIdsError: it cannot be read.
        """
        (read,) = self._policy_text.of_ids([token_ids])
        if isinstance(read, ScoringError):
            raise read
        *prompt, last = _as_dicts(read)
        return [*prompt, self._without_thinking(last)]

    def _prompt(self, prompt: Turns) -> list[dict[str, str]]:
        if not isinstance(prompt, str):
            return [self._text_message(message, place) for place, message in enumerate(prompt)]
        return self._read(prompt) if opens_turn(prompt) else [_message("user", prompt)]

    def _response(self, response: Turns) -> list[dict[str, str]]:
        if isinstance(response, str):
            return [_message("assistant", without_ending(response))]
        if not response:
            raise ConversationError("the response has no message")
        return [self._text_message(message, place) for place, message in enumerate(response)]

    def _text_message(self, message: Mapping[str, Any], place: int) -> dict[str, str]:
        """`message` with its role and text; keys that trainers add and leave empty are no part of it."""
        if not isinstance(message, Mapping):
            raise ConversationError(f"message {place} is {type(message).__name__}, not a role and a content")
        left_out = {"role", "content", *(REASONING_KEYS if self.strip_thinking else ())}
        more = sorted(str(key) for key, value in message.items() if key not in left_out and value)
        if more:
            hint = "; strip_thinking=True leaves reasoning out" if set(more) <= set(REASONING_KEYS) else ""
            raise ConversationError(f"message {place} has {more}, for which the reward model has no text{hint}")
        return _message(message.get("role"), _text(message.get("content"), place))

    def _without_thinking(self, message: dict[str, str]) -> dict[str, str]:
        return _message(message["role"], without_thinking(message["content"])) if self.strip_thinking else message

    def _read(self, text: str) -> list[dict[str, str]]:
        read = self._chatml.read(text) if self.policy_tokenizer is None else self._policy_text.of_text(text)
        return _as_dicts(read)

    @cached_property
    def _policy_text(self) -> PolicyText:
        return PolicyText.from_pretrained(self.policy_tokenizer)

    @cached_property
    def _chatml(self) -> RenderedTextReader:
        return RenderedTextReader(_no_template, special_tokens=(), framing=())


def _no_template(messages: Sequence[Message]) -> str:
    raise ConversationError("no policy_tokenizer is named, so ChatML alone can be read")


def _as_dicts(conversation: Conversation) -> list[dict[str, str]]:
    return [_message(message.role, message.content) for message in conversation.messages]


def _message(role: Any, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text(content: Any, place: int) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    parts = content if isinstance(content, Sequence) else [content]
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        raise ConversationError(f"message {place} has content other than text")
    return "".join(str(part["text"]) for part in parts)
