"""RewardEnsemble: several reward models asked at once, one reward an item."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from cluster.reward_pool.encoder import OnError
from cluster.reward_pool.errors import RewardInputError
from cluster.reward_pool.rewards import Combination, Rewards, combine
from serve_app.reward_model import ConversationLike

Shape = Callable[[Rewards], list[float | None]]


class EnsembleMember(Protocol):
    """One model of an ensemble, such as a `RewardActorPool`."""

    def score(self, conversations: Sequence[ConversationLike], *, on_error: OnError = ...) -> list[float | None]: ...

    async def score_async(
        self, conversations: Sequence[ConversationLike], *, on_error: OnError = ...
    ) -> list[float | None]: ...


class RewardEnsemble:
    """Several models as one: `score` and `score_async` as those of a `RewardActorPool`.

    Args:
        members: at least one; pools of different models score at the same time.
        how: see `rewards.combine`, as `weight`.
        shapes: for each member what makes its scores comparable with the others', such as a `RunningNormalization`;
            by default they are combined raw.
    """

    def __init__(
        self,
        members: Sequence[EnsembleMember],
        how: Combination = "mean",
        *,
        weight: float = 1.0,
        shapes: Sequence[Shape] | None = None,
    ) -> None:
        if shapes is not None and len(shapes) != len(members):
            raise RewardInputError(f"{len(members)} members have {len(shapes)} shapes; each needs one")
        combine([[] for _ in members], how)  # so that a wrong argument is an error here
        self._members = list(members)
        self._how = how
        self._weight = weight
        self._shapes = shapes

    def score(self, conversations: Sequence[ConversationLike], *, on_error: OnError = "raise") -> list[float | None]:
        """The combined reward of each conversation, in order; null where any member's is."""

        def ask(member: EnsembleMember) -> list[float | None]:
            return member.score(conversations, on_error=on_error)

        with ThreadPoolExecutor(len(self._members), thread_name_prefix="ensemble") as threads:
            return self._combined(list(threads.map(ask, self._members)))

    async def score_async(
        self, conversations: Sequence[ConversationLike], *, on_error: OnError = "raise"
    ) -> list[float | None]:
        """The same on an event loop."""
        asked = (member.score_async(conversations, on_error=on_error) for member in self._members)
        return self._combined(list(await asyncio.gather(*asked)))

    def _combined(self, rewards: list[list[float | None]]) -> list[Any]:
        if self._shapes is not None:
            rewards = [shape(of_member) for shape, of_member in zip(self._shapes, rewards, strict=True)]
        return list(combine(rewards, self._how, weight=self._weight))
