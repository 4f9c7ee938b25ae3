"""Raw scores -> rewards, where a trainer asks for it by name; nothing here is on unless it is called.

Each of these belongs in one place: frameworks clip and normalise too, and twice is not what was meant. A null, the
reward of an item that could not be scored, stays one and takes part in no statistic.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

from cluster.reward_pool.errors import RewardInputError
from cluster.reward_pool.moments import Moments

__all__ = ["Combination", "Rewards", "RunningNormalization", "clip", "combine", "group_advantages"]

Rewards = Sequence[float | None]
Combination = Literal["mean", "min", "mean_minus_std"]

EPSILON = 1e-8


def clip(rewards: Rewards, low: float, high: float) -> list[float | None]:
    """Each reward, brought into `[low, high]`. Raises `RewardInputError` unless `low` is below `high`."""
    if not low < high:
        raise RewardInputError(f"clip: low {low} is not below high {high}")
    return [None if reward is None else min(max(reward, low), high) for reward in rewards]


class RunningNormalization:
    """`(reward - mean) / std` over all rewards seen so far, those given included; `center` False leaves the mean in.

    Of several processes each has one of its own. Now and then every one gathers the `own` moments of all, in the same
    order, and calls `merge` with them: then all go on from the same mean and deviation, and no reward counts twice.
    `state` and `restore` keep it across restarts. While fewer than two different rewards were seen, rewards are centred
    alone. The deviation is the population's.
    """

    def __init__(self, *, center: bool = True) -> None:
        self.center = center
        self.merged = Moments()
        """Of the rewards that every process knows of."""
        self.own = Moments()
        """Of the rewards that came here since the last merge."""

    @property
    def moments(self) -> Moments:
        """Of everything that is known here."""
        return self.merged.with_others(self.own)

    def __call__(self, rewards: Rewards) -> list[float | None]:
        """Take `rewards` in, and normalise them. Raises `RewardInputError` where one is not finite."""
        for place, reward in enumerate(rewards):
            if reward is not None and not math.isfinite(reward):
                raise RewardInputError(f"reward {place} is {reward}; a running mean would never recover from it")
        self.own = self.own.with_others(Moments.of([reward for reward in rewards if reward is not None]))
        return self.normalized(rewards)

    def normalized(self, rewards: Rewards) -> list[float | None]:
        """Normalise without taking in, as for an evaluation."""
        moments = self.moments
        mean = moments.mean if self.center else 0.0
        scale = moments.std if moments.std > EPSILON else 1.0
        return [None if reward is None else (reward - mean) / scale for reward in rewards]

    def merge(self, owns: Sequence[Moments]) -> None:
        """Go on from what all processes have seen: `owns` are the `own` of each, this one's included."""
        if self.own not in owns:
            raise RewardInputError("merge takes the own moments of every process, and this one's are not among them")
        self.merged = Moments.merged([self.merged, *owns])
        self.own = Moments()

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON knows it."""
        return {"center": self.center, "merged": self.merged.to_json(), "own": self.own.to_json()}

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> RunningNormalization:
        """What `state` wrote. Raises `ValueError` where it is none."""
        try:
            center, merged, own = state["center"], state["merged"], state["own"]
        except KeyError as error:
            raise ValueError(f"the state of a running normalization lacks {error}") from None
        restored = cls(center=bool(center))
        restored.merged, restored.own = Moments.from_json(merged), Moments.from_json(own)
        return restored


def group_advantages(
    rewards: Rewards, groups: Sequence[Hashable] | int, *, scale: bool = True, epsilon: float = 1e-4
) -> list[float | None]:
    """GRPO's advantage of each reward within its group: `(reward - mean) / (std + epsilon)`.

    Shao et al. (2024), "DeepSeekMath", section 4.1.2; the deviation is the sample's (n - 1), as in TRL. A group of one
    has the advantage 0.

    Args:
        rewards: one a completion.
        groups: each completion's group, such as its prompt's number; or how many in a row make one.
        scale: False leaves the division out, as Dr. GRPO does (Liu et al., 2025).
        epsilon: keeps a group of equal rewards from a division by zero.

    Raises:
        RewardInputError: the lengths do not fit.
    """
    if isinstance(groups, int):
        if groups < 1 or len(rewards) % groups:
            raise RewardInputError(f"{len(rewards)} rewards are no groups of {groups}")
        groups = [place // groups for place in range(len(rewards))]
    if len(groups) != len(rewards):
        raise RewardInputError(f"{len(rewards)} rewards have {len(groups)} groups; each needs one")
    members: dict[Hashable, list[float]] = {}
    for reward, group in zip(rewards, groups, strict=True):
        if reward is not None:
            members.setdefault(group, []).append(reward)
    moments = {group: Moments.of(values) for group, values in members.items()}

    def advantage(reward: float, of_group: Moments) -> float:
        std = math.sqrt(of_group.m2 / (of_group.count - 1)) if of_group.count > 1 else 0.0
        return (reward - of_group.mean) / (std + epsilon if scale else 1.0)

    return [
        None if reward is None else advantage(reward, moments[group])
        for reward, group in zip(rewards, groups, strict=True)
    ]


def combine(rewards_of_models: Sequence[Rewards], how: Combination = "mean", *, weight: float = 1.0) -> Rewards:
    """One reward an item from several models': their mean, the least, or the mean less `weight` times their deviation.

    Coste et al. (2024), "Reward Model Ensembles Help Mitigate Overoptimization": "min" is their worst-case
    optimization, "mean_minus_std" their uncertainty-weighted one with the deviation in place of the variance; it is
    the population's. Models' raw scores differ in scale: normalise each first. Null where any model's is.

    Raises:
        RewardInputError: there is no model, the lengths differ, or `how` is unknown.
    """
    if not rewards_of_models:
        raise RewardInputError("combine needs the rewards of at least one model")
    lengths = [len(rewards) for rewards in rewards_of_models]
    if len(set(lengths)) > 1:
        raise RewardInputError(f"the models gave different numbers of rewards: {lengths}")
    if how not in ("mean", "min", "mean_minus_std"):
        raise RewardInputError(f"how is 'mean', 'min' or 'mean_minus_std', not {how!r}")

    def combined(values: Sequence[float]) -> float:
        if how == "min":
            return min(values)
        moments = Moments.of(values)
        return moments.mean - weight * moments.std if how == "mean_minus_std" else moments.mean

    items = zip(*rewards_of_models, strict=True)
    return [None if None in item else combined([reward for reward in item if reward is not None]) for item in items]
