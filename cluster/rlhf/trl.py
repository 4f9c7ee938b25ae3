"""TRL: a reward function for `GRPOTrainer`, `RLOOTrainer`, `OnlineDPOTrainer` and AsyncGRPO. Read and run: TRL 1.16.0.

    from cluster.rlhf.trl import RewardFunction

    trainer = GRPOTrainer(model=policy, reward_funcs=RewardFunction(pool), args=args, train_dataset=dataset)

TRL calls `f(prompts=, completions=, completion_ids=, **dataset columns, trainer_state=, log_extra=, log_metric=)` and
wants as many rewards as completions; None stands for no reward and becomes NaN, which it leaves out of the sum of
several functions. Completions of conversational datasets are lists of messages, of others text without special tokens.
`is_async_callable` looks at the class's `__call__`, so there are two classes. AsyncGRPO pickles what it is given and
sends it to a process of its own; OnlineDPO calls functions without awaiting them, so it takes `RewardFunction` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.rlhf.rollouts import Rewards, RolloutScorer, Turns
from cluster.rlhf.sources import OnError


class RewardFunction:
    """Rewards of TRL's completions: raw logits in order. Pickles where its source does.

    Args:
        source, policy_tokenizer, strip_thinking, on_error, reference_column: see `RolloutScorer`.
        name: what TRL's logs call it, as in `rewards/rayward/mean`.
    """

    def __init__(
        self,
        source: Any = None,
        *,
        name: str = "rayward",
        policy_tokenizer: Any = None,
        strip_thinking: bool = False,
        on_error: OnError = "raise",
        reference_column: str | None = None,
    ) -> None:
        self.__name__ = name
        self._scorer = RolloutScorer(
            source,
            policy_tokenizer=policy_tokenizer,
            strip_thinking=strip_thinking,
            on_error=on_error,
            reference_column=reference_column,
        )

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[Turns], **columns: Any) -> Rewards:
        """See `RolloutScorer.rewards`; of `columns` the references are read, where their column was named."""
        return self._scorer.rewards(prompts, completions, columns)


class AsyncRewardFunction(RewardFunction):
    """`RewardFunction` that TRL awaits together with other asynchronous ones."""

    async def __call__(  # type: ignore[override]  # TRL tells the two apart by this
        self, prompts: Sequence[Turns], completions: Sequence[Turns], **columns: Any
    ) -> Rewards:
        """See `RewardFunction.__call__`."""
        return await self._scorer.rewards_async(prompts, completions, columns)
