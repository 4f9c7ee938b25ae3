"""Rollouts: what trainers hand over -> conversations -> rewards, by a `RewardSource`; and how trainers name one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.reward_pool.errors import RewardInputError
from cluster.reward_pool.policy import PolicyText, without_thinking
from cluster.rlhf.errors import RewardSourceError
from cluster.rlhf.sources import (
    Messages,
    OnError,
    RewardSource,
    as_reward_source,
    pool_named,
    reward_source_from_environment,
)
from serve_app.reward_model import Conversation, ConversationError, Message, ScoringError
from serve_app.reward_model.rendered_text import RenderedTextReader, opens_turn, without_ending

Turns: TypeAlias = "str | Sequence[Mapping[str, Any]]"
"""Text, or messages with `role` and `content`."""
REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")


class RolloutReader:
    """Makes conversations of a trainer's prompts and responses. Pickles.

    Args:
        policy_tokenizer: the policy's tokenizer, or its folder or Hugging Face id. It is needed for rendered text in
            a template that `turn_formats.py` does not know; with it, the system prompt that its template adds unasked
            is left out too.
        strip_thinking: leave out of responses what stands before `</think>`; without it that is scored as text.
    """

    def __init__(self, policy_tokenizer: Any = None, *, strip_thinking: bool = False) -> None:
        self.policy_tokenizer = policy_tokenizer
        self.strip_thinking = strip_thinking

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("policy_tokenizer", "strip_thinking")}

    def conversation(self, prompt: Turns, response: Turns) -> list[dict[str, str]]:
        """The conversation of one prompt and its response.

        A prompt that ends in an assistant's turn, such as an opened one, is continued by the response; rendered, the
        turn must be open.

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

    def read(self, text: str, *, prompt: str | None = None) -> list[dict[str, str]]:
        """The conversation of a whole rendered text. Special tokens delimit turns in it, also the policy's own.

        `prompt` is what the text begins with, but for a BOS, where that is known: what follows is the response.

        Raises:
            RenderedTextError: it has no format that `rendered_text.py` reads, nor the policy's template.
        """
        *before, last = self._read(text, prompt=prompt)
        return [*before, self._without_thinking(last)]

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
        if not opens_turn(prompt):
            return [_message("user", prompt)]
        *before, opened = self._read(prompt, prompt=prompt)
        return [*before, opened] if opened["content"] else before

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

    def _read(self, text: str, *, prompt: str | None = None) -> list[dict[str, str]]:
        if self.policy_tokenizer is None:
            return _as_dicts(self._known_formats.read(text, prompt=prompt))
        return _as_dicts(self._policy_text.of_text(text, prompt=prompt))

    @cached_property
    def _policy_text(self) -> PolicyText:
        return PolicyText.from_pretrained(self.policy_tokenizer)

    @cached_property
    def _known_formats(self) -> RenderedTextReader:
        return RenderedTextReader(_no_template, special_tokens=(), framing=())


def _no_template(messages: Sequence[Message]) -> str:
    raise ConversationError("no policy_tokenizer is named, so there is no template of its own")


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


Rewards: TypeAlias = "list[float | None]"
Read: TypeAlias = "list[dict[str, str]] | dict[str, Any] | ConversationError"
"""Messages, or messages with a reference; or why they could not be read."""


class RolloutScorer:
    """Scores rollouts. Pickles where its source does.

    Args:
        source: a `RewardActorPool`, a `RewardModel`, the address of an endpoint, or any `RewardSource`; None is what
            the environment names where the first reward is asked for: see `reward_source_from_environment`.
        policy_tokenizer, strip_thinking: see `RolloutReader`.
        on_error: "raise", or "null": a rollout that cannot be scored has None for a reward, and the others theirs.
        reference_column: the column of the dataset whose text each response is compared with, for POLAR's models.
    """

    def __init__(
        self,
        source: Any = None,
        *,
        policy_tokenizer: Any = None,
        strip_thinking: bool = False,
        on_error: OnError = "raise",
        reference_column: str | None = None,
    ) -> None:
        if on_error not in ("raise", "null"):
            raise RewardInputError(f"on_error is 'raise' or 'null', not {on_error!r}")
        self._given = None if source is None else as_reward_source(source)
        self._on_error = on_error
        self.reference_column = reference_column
        self.reader = RolloutReader(policy_tokenizer, strip_thinking=strip_thinking)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_given", "_on_error", "reference_column", "reader")}

    def rewards(
        self, prompts: Sequence[Turns], responses: Sequence[Turns], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> Rewards:
        """One reward per prompt and response, in order: raw logits. `columns` are those of the dataset.

        Raises:
            RewardInputError: there are not as many prompts, or references, as responses.
            ConversationError, ScoringError: a rollout cannot be scored; its place is `error.index`.
            RewardSourceError, RewardPoolError: no rewards can be had.
        """
        return self.rewards_of(self._read(prompts, responses, columns or {}))

    async def rewards_async(
        self, prompts: Sequence[Turns], responses: Sequence[Turns], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> Rewards:
        """`rewards` for an event loop, which stays free."""
        read = await asyncio.to_thread(self._read, prompts, responses, columns or {})
        return await self.rewards_of_async(read)

    def rewards_of(self, read: Sequence[Read]) -> Rewards:
        """`rewards` of conversations, or of the errors in place of some."""
        places, conversations = self._scorable(read)
        scores = self._source.score(conversations, on_error=self._on_error) if conversations else []
        return _placed(scores, places, len(read))

    async def rewards_of_async(self, read: Sequence[Read]) -> Rewards:
        """`rewards_of` for an event loop."""
        places, conversations = self._scorable(read)
        scores = await self._source.score_async(conversations, on_error=self._on_error) if conversations else []
        return _placed(scores, places, len(read))

    def all_rewards(self, prompts: Sequence[Turns], responses: Sequence[Turns]) -> list[float]:
        """`rewards` for trainers that have no place for a missing one."""
        return _none_missing(self.rewards(prompts, responses))

    def all_rewards_of(self, read: Sequence[Read]) -> list[float]:
        """`rewards_of` for trainers that have no place for a missing one."""
        return _none_missing(self.rewards_of(read))

    async def all_rewards_of_async(self, read: Sequence[Read]) -> list[float]:
        """`all_rewards_of` for an event loop."""
        return _none_missing(await self.rewards_of_async(read))

    def read_each(self, num: int, read: Callable[[int], list[dict[str, str]]]) -> list[Read]:
        """What `read` makes of the places 0 to `num`, or the error that names its place."""
        results: list[Read] = []
        for place in range(num):
            try:
                results.append(read(place))
            except ConversationError as error:
                error.index = place
                results.append(error)
        return results

    def with_references(self, read: Sequence[Read], columns: Mapping[str, Sequence[Any]]) -> list[Read]:
        """Conversations with what each response is compared with, where a column of references was named.

        Raises:
            RewardInputError: the dataset has no such column, or another number of references.
        """
        name = self.reference_column
        if name is None:
            return list(read)
        references = columns.get(name)
        if references is None or len(references) != len(read):
            found = f"no column {name!r}" if references is None else f"{len(references)} references in {name!r}"
            raise RewardInputError(f"there is {found} for {len(read)} completions; columns: {', '.join(columns)}")
        return [
            item if isinstance(item, ConversationError) else {"messages": item, "reference": reference}
            for item, reference in zip(read, references, strict=True)
        ]

    def _read(
        self, prompts: Sequence[Turns], responses: Sequence[Turns], columns: Mapping[str, Sequence[Any]]
    ) -> list[Read]:
        if len(prompts) != len(responses):
            raise RewardInputError(f"there are {len(prompts)} prompts and {len(responses)} responses")
        read = self.read_each(len(prompts), lambda at: self.reader.conversation(prompts[at], responses[at]))
        return self.with_references(read, columns)

    def _scorable(self, read: Sequence[Read]) -> tuple[list[int], list[Messages]]:
        """The places of the conversations that could be read, and those. Raises the first error unless told not to."""
        places: list[int] = []
        conversations: list[Messages] = []
        for place, result in enumerate(read):
            if not isinstance(result, ConversationError):
                places.append(place)
                conversations.append(result)
            elif self._on_error == "raise":
                raise result
        return places, conversations

    @cached_property
    def _source(self) -> RewardSource:
        return reward_source_from_environment() if self._given is None else self._given


def _placed(scores: Sequence[float | None], places: Sequence[int], num: int) -> Rewards:
    if len(scores) != len(places):
        raise RewardSourceError(f"the source gave {len(scores)} scores for {len(places)} conversations")
    by_place = dict(zip(places, scores, strict=True))
    return [by_place.get(place) for place in range(num)]


def _none_missing(rewards: Rewards) -> list[float]:
    missing = [place for place, reward in enumerate(rewards) if reward is None]
    if missing:
        raise RewardSourceError(f"the source gave no score for item {missing[0]}, and the trainer needs one")
    return [reward for reward in rewards if reward is not None]


class SourceSettings(BaseModel):
    """A source of rewards and how rollouts are read; without `url` and `pool` the environment variables name one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = None
    """The address of an endpoint."""
    pool: str | None = None
    """The name of a detached RewardActorPool."""
    policy_tokenizer: str | None = None
    """The policy's tokenizer, a folder or a Hugging Face id; needed where its template is not ChatML."""
    strip_thinking: bool = False
    """Leave out of responses what stands before </think>."""
    reference_column: str | None = None
    """The column whose text each response is compared with, for POLAR's models."""

    @classmethod
    def of(cls, given: Mapping[str, Any], *, where: str) -> Self:
        """The settings in the trainer's configuration at `where`. Raises RewardInputError where one is wrong."""
        try:
            settings = cls.model_validate({str(key): value for key, value in given.items()})
        except ValidationError as error:
            raise RewardInputError(f"{where}: {error}") from error
        if settings.url and settings.pool:
            raise RewardInputError(f"{where} names both url and pool; keep one")
        return settings

    def scorer(self, policy_tokenizer: Any = None) -> RolloutScorer:
        """A scorer over the source; a `policy_tokenizer` that the trainer hands over goes before the settings'."""
        tokenizer = self.policy_tokenizer if policy_tokenizer is None else policy_tokenizer
        return RolloutScorer(
            self._source(),
            policy_tokenizer=tokenizer,
            strip_thinking=self.strip_thinking,
            reference_column=self.reference_column,
        )

    def _source(self) -> RewardSource | None:
        if self.pool:
            return pool_named(self.pool)
        return as_reward_source(self.url) if self.url else None
