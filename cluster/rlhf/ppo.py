"""PPO as a Ray program of four kinds of actors: policy, reference, critic and reward.

    python -m cluster.rlhf.ppo

In each step the policy samples responses to the prompts; the reward actors, the reference and the critic read them at
the same time; and the policy and the critic learn from the advantages, again at the same time. Rewards are asked for by
prompt and response, not by the whole sequence of tokens: a policy may write a turn's marker into its response.

The algorithm is that of Schulman et al., 2017 (arXiv:1707.06347) with generalised advantage estimation
(arXiv:1506.02438) and a penalty on the KL divergence from the reference in each token's reward, as in Ouyang et al.,
2022 (arXiv:2203.02155). Shape legend: B sequences, R response tokens, T prompt and response tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from cluster.reward_pool.rewards import place_at_last_token
from cluster.rlhf.errors import TrainingError
from cluster.rlhf.learning import LearningCurve, TrainingOptions, run_command, run_trainings
from cluster.rlhf.rollouts import RolloutScorer
from cluster.rlhf.tiny_policy import PROMPTS, Rollout, generate, share_right, taught_policy, taught_values

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 600.0
ACTOR_CPUS = 0.5  # bookkeeping: each computes in one thread, and they wait for each other
LOGGED_EVERY = 10


@dataclass(frozen=True, slots=True)
class PpoOptions:
    """How to train.

    `kl_coefficient` weighs the penalty on leaving the reference; `discount` and `trace` are the gamma and lambda of
    the advantages; `clip_range` bounds the policy's ratio and `value_clip_range` the move of a value within a step.
    """

    num_steps: int = 60
    responses_per_prompt: int = 4
    max_new_tokens: int = 24
    num_epochs: int = 2
    num_minibatches: int = 2
    policy_learning_rate: float = 1.5e-4
    value_learning_rate: float = 1e-3
    kl_coefficient: float = 0.02
    discount: float = 1.0
    trace: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.5
    max_grad_norm: float = 1.0


def advantages_and_returns(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, *, discount: float, trace: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantages, and what the critic is to learn: arXiv:1506.02438, equations 11 and 16.

    The state after the last token that counts is worth nothing: there the episode ends.
    """
    advantages_BR = torch.zeros_like(rewards_BR)
    following_B = torch.zeros_like(rewards_BR[:, 0])
    next_values_B = torch.zeros_like(rewards_BR[:, 0])
    for step in reversed(range(rewards_BR.shape[1])):
        counts_B = mask_BR[:, step]
        errors_B = rewards_BR[:, step] + discount * next_values_B - values_BR[:, step]
        following_B = (errors_B + discount * trace * following_B) * counts_B
        next_values_B = values_BR[:, step] * counts_B
        advantages_BR[:, step] = following_B
    return advantages_BR, (advantages_BR + values_BR) * mask_BR


def policy_loss(
    logprobs_BR: Tensor, old_logprobs_BR: Tensor, advantages_BR: Tensor, mask_BR: Tensor, *, clip_range: float
) -> Tensor:
    """The clipped objective, to be made small: arXiv:1707.06347, equation 7; the mean over the tokens that count."""
    ratio_BR = (logprobs_BR - old_logprobs_BR).exp()
    clipped_BR = ratio_BR.clamp(1.0 - clip_range, 1.0 + clip_range)
    return -masked_mean(torch.minimum(ratio_BR * advantages_BR, clipped_BR * advantages_BR), mask_BR)


def value_loss(
    values_BR: Tensor, old_values_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor, *, clip_range: float
) -> Tensor:
    """Half the squared error of values, the larger of it and that of values held near the old ones."""
    near_BR = old_values_BR + (values_BR - old_values_BR).clamp(-clip_range, clip_range)
    errors_BR = torch.maximum((values_BR - returns_BR) ** 2, (near_BR - returns_BR) ** 2)
    return 0.5 * masked_mean(errors_BR, mask_BR)


def masked_mean(values_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """The mean of the values that count."""
    return (values_BR * mask_BR).sum() / mask_BR.sum()


def whitened(values_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """The values that count, shifted and scaled to mean 0 and standard deviation 1; 0 for the others."""
    centred_BR = (values_BR - masked_mean(values_BR, mask_BR)) * mask_BR
    return centred_BR / (masked_mean(centred_BR**2, mask_BR).sqrt() + 1e-8)


class PolicyActor:
    """The policy that learns; the same class, left alone, is the reference. Samples alike for the same seed."""

    def __init__(self, seed: int, options: PpoOptions) -> None:
        torch.set_num_threads(1)
        self._options = options
        torch.manual_seed(seed)
        self._policy = taught_policy()
        self._optimizer = torch.optim.Adam(self._policy.parameters(), lr=options.policy_learning_rate)

    def generate(self, prompts: list[str]) -> tuple[Rollout, list[str], Tensor]:
        """A response to each prompt: as tokens, as text, and the log-probability of each token [B, R]."""
        rollout = generate(self._policy, prompts, max_new_tokens=self._options.max_new_tokens)
        return rollout, rollout.response_texts(), self.logprobs(rollout)

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> Tensor:
        """The log-probability of each response token [B, R]."""
        return self._logprobs(rollout)

    def update(self, rollout: Rollout, old_logprobs_BR: Tensor, advantages_BR: Tensor) -> float:
        """Learn from one batch; the loss before the first of its updates."""

        def loss(places: Tensor) -> Tensor:
            rows = rollout.rows(places)
            return policy_loss(
                self._logprobs(rows),
                old_logprobs_BR[places],
                advantages_BR[places],
                rows.response_mask_BR,
                clip_range=self._options.clip_range,
            )

        return _learn(self._policy, self._optimizer, loss, len(advantages_BR), self._options)

    def _logprobs(self, rollout: Rollout) -> Tensor:
        logits_BRV = _response_outputs(self._policy, rollout)
        chosen_BR = rollout.sequences_BT[:, rollout.num_prompt_tokens :]
        return F.log_softmax(logits_BRV, dim=-1).gather(2, chosen_BR[:, :, None])[:, :, 0]


class CriticActor:
    """Predicts from each state of a response what is still to come of rewards."""

    def __init__(self, seed: int, options: PpoOptions) -> None:
        torch.set_num_threads(1)
        self._options = options
        torch.manual_seed(seed)
        self._critic = taught_values()
        self._optimizer = torch.optim.Adam(self._critic.parameters(), lr=options.value_learning_rate)

    @torch.no_grad()
    def values(self, rollout: Rollout) -> Tensor:
        """The value of the state before each response token [B, R]."""
        return self._values(rollout)

    def update(self, rollout: Rollout, old_values_BR: Tensor, returns_BR: Tensor) -> float:
        """Learn from one batch; the loss before the first of its updates."""

        def loss(places: Tensor) -> Tensor:
            rows = rollout.rows(places)
            return value_loss(
                self._values(rows),
                old_values_BR[places],
                returns_BR[places],
                rows.response_mask_BR,
                clip_range=self._options.value_clip_range,
            )

        return _learn(self._critic, self._optimizer, loss, len(returns_BR), self._options)

    def _values(self, rollout: Rollout) -> Tensor:
        return _response_outputs(self._critic, rollout)[:, :, 0]


def _response_outputs(model: Any, rollout: Rollout) -> Tensor:
    """The model's outputs at the states before each response token, [B, R, ...]."""
    positions_BT = (rollout.mask_BT.cumsum(dim=1) - 1).clamp(min=0)  # prompts are padded on the left
    outputs_BT = model(input_ids=rollout.sequences_BT, attention_mask=rollout.mask_BT, position_ids=positions_BT)
    states: Tensor = outputs_BT.logits[:, rollout.num_prompt_tokens - 1 : -1]
    return states


def _learn(model: Any, optimizer: Any, loss: Callable[[Tensor], Tensor], num_rows: int, options: PpoOptions) -> float:
    """Epochs of minibatches in random order; `loss` is that of some rows."""
    losses = []
    for _ in range(options.num_epochs):
        for places in torch.randperm(num_rows).chunk(options.num_minibatches):
            value = loss(places)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            losses.append(float(value.detach()))
    return losses[0]


def train_ppo(source: Any, *, seed: int, options: PpoOptions | None = None) -> LearningCurve:
    """Train a tiny policy from `seed` with rewards of `source`; the mean reward of each step's batch.

    Ray is connected already, and `source` is a `RewardActorPool` or anything else that a `RolloutScorer` takes.

    Raises:
        TrainingError: an actor died or gave no answer in time.
        RaywardError: the source has no rewards.
    """
    import ray

    options = options or PpoOptions()
    scorer = RolloutScorer(source)
    started: list[Any] = []
    for role in (PolicyActor, PolicyActor, CriticActor):
        started.append(ray.remote(num_cpus=ACTOR_CPUS)(role).remote(seed, options))
    policy, reference, critic = started
    prompts = [prompt for prompt in PROMPTS for _ in range(options.responses_per_prompt)]
    rewards: list[float] = []
    shares: list[float] = []
    try:
        for step in range(1, options.num_steps + 1):
            mean_reward, share, mean_kl = _step(scorer, policy, reference, critic, prompts, options)
            rewards.append(mean_reward)
            shares.append(share)
            if step % LOGGED_EVERY == 0 or step == options.num_steps:
                logger.info(
                    "ppo seed %d: step %d, reward %.3f, right %.2f, KL %.3f", seed, step, mean_reward, share, mean_kl
                )
    finally:
        for actor in started:
            ray.kill(actor)
    return LearningCurve("PPO", seed, tuple(rewards), tuple(shares))


def _step(
    scorer: RolloutScorer, policy: Any, reference: Any, critic: Any, prompts: list[str], options: PpoOptions
) -> tuple[float, float, float]:
    """One batch of PPO; its mean reward, the share of right answers, and its mean KL divergence from the reference a
    token.
    """
    rollout, responses, logprobs_BR = _answers(policy.generate.remote(prompts))[0]
    reading = (reference.logprobs.remote(rollout), critic.values.remote(rollout))
    rewards_B = torch.tensor(scorer.all_rewards(prompts, responses), dtype=torch.float32)
    reference_BR, values_BR = _answers(*reading)

    mask_BR = rollout.response_mask_BR
    kl_BR = (logprobs_BR - reference_BR) * mask_BR
    rewards_BR = place_at_last_token(rewards_B, mask_BR) - options.kl_coefficient * kl_BR
    advantages_BR, returns_BR = advantages_and_returns(
        rewards_BR, values_BR, mask_BR, discount=options.discount, trace=options.trace
    )
    _answers(
        policy.update.remote(rollout, logprobs_BR, whitened(advantages_BR, mask_BR)),
        critic.update.remote(rollout, values_BR, returns_BR),
    )
    return float(rewards_B.mean()), share_right(prompts, responses), float(masked_mean(kl_BR, mask_BR))


def _answers(*refs: Any) -> list[Any]:
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return list(ray.get(list(refs), timeout=ANSWER_TIMEOUT_S))
    except GetTimeoutError as error:
        raise TrainingError(f"an actor of the training gave no answer within {ANSWER_TIMEOUT_S:g} s") from error
    except RayError as error:
        raise TrainingError(f"an actor of the training failed: {error}") from error


def main() -> int:
    """Run the command line; the exit status."""
    config = tyro.cli(TrainingOptions, description=__doc__, prog="python -m cluster.rlhf.ppo")
    return run_command(lambda: run_trainings(config, [train_steps]))


def train_steps(pool: Any, seed: int, num_steps: int) -> LearningCurve:
    """`train_ppo` as a `Training`."""
    return train_ppo(pool, seed=seed, options=PpoOptions(num_steps=num_steps))


if __name__ == "__main__":
    sys.exit(main())
