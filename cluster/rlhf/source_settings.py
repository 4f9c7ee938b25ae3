"""Where rewards come from, as trainers name it in their own configuration files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.reward_pool.errors import RewardInputError
from cluster.rlhf.reward_source import RewardSource, as_reward_source, pool_named
from cluster.rlhf.rollout_scorer import RolloutScorer

__all__ = ["SourceSettings"]


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
        return RolloutScorer(self._source(), policy_tokenizer=tokenizer, strip_thinking=self.strip_thinking)

    def _source(self) -> RewardSource | None:
        if self.pool:
            return pool_named(self.pool)
        return as_reward_source(self.url) if self.url else None
