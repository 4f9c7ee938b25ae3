"""The RLHF door: reward actors on Ray for PPO and GRPO trainers, and what is done with their rewards.

    from cluster.reward_actor import RewardActorPool

    with RewardActorPool("internlm/internlm2-1_8b-reward", num_actors=2, num_gpus=0.5) as pool:
        rewards = pool.score(conversations)

The parts are in `cluster/reward_pool/`, adapters for trainers in `cluster/rlhf/`.
"""

from __future__ import annotations

from cluster.reward_pool.actor import RewardActor
from cluster.reward_pool.ensemble import RewardEnsemble
from cluster.reward_pool.pool import RewardActorPool
from cluster.reward_pool.rewards import RunningNormalization, clip, combine, group_advantages, place_at_last_token

__all__ = [
    "RewardActor",
    "RewardActorPool",
    "RewardEnsemble",
    "RunningNormalization",
    "clip",
    "combine",
    "group_advantages",
    "place_at_last_token",
]
