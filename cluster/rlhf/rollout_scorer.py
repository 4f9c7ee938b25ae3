"""Prompts and responses of a trainer -> rewards, through `rollout_reader.py` and a `RewardSource`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from cluster.reward_pool.errors import RewardInputError
from cluster.rlhf.errors import RewardSourceError
from cluster.rlhf.reward_source import OnError, RewardSource, as_reward_source, reward_source_from_environment
from cluster.rlhf.rollout_reader import RolloutReader, Turns
from serve_app.reward_model import ConversationError

__all__ = ["Read", "Rewards", "RolloutScorer"]

Rewards: TypeAlias = "list[float | None]"
Read: TypeAlias = "list[dict[str, str]] | ConversationError"


class RolloutScorer:
    """Scores rollouts. Pickles where its source does.

    Args:
        source: a `RewardActorPool`, a `RewardModel`, the address of an endpoint, or any `RewardSource`; None is what
            the environment names where the first reward is asked for: see `reward_source_from_environment`.
        policy_tokenizer, strip_thinking: see `RolloutReader`.
        on_error: "raise", or "null": a rollout that cannot be scored has None for a reward, and the others theirs.
    """

    def __init__(
        self,
        source: Any = None,
        *,
        policy_tokenizer: Any = None,
        strip_thinking: bool = False,
        on_error: OnError = "raise",
    ) -> None:
        if on_error not in ("raise", "null"):
            raise RewardInputError(f"on_error is 'raise' or 'null', not {on_error!r}")
        self._given = None if source is None else as_reward_source(source)
        self._on_error = on_error
        self.reader = RolloutReader(policy_tokenizer, strip_thinking=strip_thinking)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_given", "_on_error", "reader")}

    def rewards(self, prompts: Sequence[Turns], responses: Sequence[Turns]) -> Rewards:
        """One reward per prompt and response, in order: raw logits.

        Raises:
            RewardInputError: there are not as many prompts as responses.
            ConversationError, ScoringError: a rollout cannot be scored; its place is `error.index`.
            RewardSourceError, RewardPoolError: no rewards can be had.
        """
        return self.rewards_of(self._read(prompts, responses))

    async def rewards_async(self, prompts: Sequence[Turns], responses: Sequence[Turns]) -> Rewards:
        """`rewards` for an event loop, which stays free."""
        read = await asyncio.to_thread(self._read, prompts, responses)
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

    def _read(self, prompts: Sequence[Turns], responses: Sequence[Turns]) -> list[Read]:
        if len(prompts) != len(responses):
            raise RewardInputError(f"there are {len(prompts)} prompts and {len(responses)} responses")
        return self.read_each(len(prompts), lambda at: self.reader.conversation(prompts[at], responses[at]))

    def _scorable(self, read: Sequence[Read]) -> tuple[list[int], list[list[dict[str, str]]]]:
        """The places of the conversations that could be read, and those. Raises the first error unless told not to."""
        places, conversations = [], []
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
