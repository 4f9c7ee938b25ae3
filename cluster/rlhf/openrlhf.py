"""OpenRLHF: the reward function of `--reward.remote_url`. Read, and its reward path run: OpenRLHF 0.11.2.

    RAYWARD_URL=http://127.0.0.1:8000 python -m openrlhf.cli.train_ppo_ray --reward.remote_url \\
        $(python -c "import cluster.rlhf.openrlhf as it; print(it.__file__)") ...

OpenRLHF runs the file in each of its vLLM actors and calls `reward_func(queries, prompts, labels)` in a thread, one
sample at a time; a query is prompt and response decoded with the policy's special tokens. It wraps what it is given in
a list, so that a list of one would become a tensor [1, 1]: rewards are tensors [B]. An exception becomes a log line,
and the training ends later for want of a reward; so the reason is logged here as an error too. Rewards from an actor
of OpenRLHF's own launcher instead: `openrlhf_actor.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cluster.reward_pool.errors import RewardInputError
from cluster.rlhf.rollouts import RolloutScorer
from serve_app.reward_model.errors import RaywardError
from serve_app.reward_model.rendered_text import opens_turn

logger = logging.getLogger(__name__)


class RewardFunction:
    """`reward_func` of a file for `--reward.remote_url`, with a source and options of your own.

    Args:
        source, policy_tokenizer, strip_thinking: see `RolloutScorer`.
    """

    def __init__(self, source: Any = None, *, policy_tokenizer: Any = None, strip_thinking: bool = False) -> None:
        self._scorer = RolloutScorer(source, policy_tokenizer=policy_tokenizer, strip_thinking=strip_thinking)

    def __call__(self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
        """Raw logits [B] as `rewards`, which train, and as `scores`, by which OpenRLHF filters samples.

        Raises:
            RewardInputError: the lists are of different lengths, or a query is neither rendered nor begins with its
                prompt.
            ConversationError: a query cannot be read; its place is `error.index`.
        """
        try:
            rewards = self._rewards(queries, prompts)
        except RaywardError as error:
            logger.error("no rewards for %d samples: %s", len(queries), error)
            raise
        return {"rewards": rewards, "scores": rewards.clone(), "extra_logs": {"rayward_score": rewards.clone()}}

    def _rewards(self, queries: Sequence[str], prompts: Sequence[str]) -> Tensor:
        if len(queries) != len(prompts):
            raise RewardInputError(f"there are {len(queries)} queries and {len(prompts)} prompts")
        read = self._scorer.read_each(len(queries), lambda place: self._conversation(queries[place], prompts[place]))
        return torch.tensor(self._scorer.all_rewards_of(read), dtype=torch.float32)

    def _conversation(self, query: str, prompt: str) -> list[dict[str, str]]:
        if prompt and query.startswith(prompt):
            return self._scorer.reader.conversation(prompt, query[len(prompt) :])
        if opens_turn(query):  # decoding changed a space of the prompt, or put a BOS in front
            return self._scorer.reader.read(query, prompt=prompt)
        raise RewardInputError(
            "a query neither begins with its prompt nor is rendered text (--data.apply_chat_template)"
        )


@lru_cache(maxsize=1)
def _from_environment() -> RewardFunction:
    return RewardFunction()


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
    """What OpenRLHF looks for in the file: `RewardFunction` over the source that the environment names."""
    return _from_environment()(queries, prompts, labels)
