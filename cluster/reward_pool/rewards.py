"""Raw scores -> rewards, where a trainer asks for it by name: normalised, clipped, combined, one a token. Nothing here
is on unless it is called.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cluster.reward_pool.errors import RewardInputError


@dataclass(frozen=True, slots=True)
class RewardMoments:
    """How many numbers there were, their mean, and the sum of their squared distances from it (`m2`), in float64.

    Merging is the parallel variance of Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm
    for computing sample variances": two sets of numbers have the moments of the whole, whichever way it was cut.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> RewardMoments:
        """The moments of `values`; they must be finite."""
        if not values:
            return cls()
        mean = math.fsum(values) / len(values)
        return cls(len(values), mean, math.fsum((value - mean) ** 2 for value in values))

    @classmethod
    def merged(cls, parts: Iterable[RewardMoments]) -> RewardMoments:
        """The moments of all the numbers that `parts` describe, which must have none in common."""
        total = cls()
        for part in parts:
            total = total.with_others(part)
        return total

    def with_others(self, other: RewardMoments) -> RewardMoments:
        """The moments of these numbers and the other's."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        return RewardMoments(count, mean, self.m2 + other.m2 + apart * apart * self.count * other.count / count)

    @property
    def std(self) -> float:
        """The population's standard deviation: 0 for fewer than two numbers."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def to_json(self) -> dict[str, float]:
        """For a checkpoint; `from_json` reads it back without loss."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_json(cls, state: Mapping[str, float]) -> RewardMoments:
        """The moments that `to_json` wrote. Raises `ValueError` where it is none."""
        try:
            found = cls(int(state["count"]), float(state["mean"]), float(state["m2"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"moments are {{'count', 'mean', 'm2'}}; {error} is missing or no number") from error
        if found.count < 0 or found.m2 < 0 or not math.isfinite(found.mean + found.m2):
            raise ValueError(f"no numbers have these moments: {found}")
        return found


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
        self.merged = RewardMoments()
        """Of the rewards that every process knows of."""
        self.own = RewardMoments()
        """Of the rewards that came here since the last merge."""

    @property
    def moments(self) -> RewardMoments:
        """Of everything that is known here."""
        return self.merged.with_others(self.own)

    def __call__(self, rewards: Rewards) -> list[float | None]:
        """Take `rewards` in, and normalise them. Raises `RewardInputError` where one is not finite."""
        _check_finite(rewards, "a running mean would never recover from it")
        self.own = self.own.with_others(RewardMoments.of([reward for reward in rewards if reward is not None]))
        return self.normalized(rewards)

    def normalized(self, rewards: Rewards) -> list[float | None]:
        """Normalise without taking in, as for an evaluation."""
        moments = self.moments
        mean = moments.mean if self.center else 0.0
        scale = moments.std if moments.std > EPSILON else 1.0
        return [None if reward is None else (reward - mean) / scale for reward in rewards]

    def merge(self, owns: Sequence[RewardMoments]) -> None:
        """Go on from what all processes have seen: `owns` are the `own` of each, this one's included."""
        if self.own not in owns:
            raise RewardInputError("merge takes the own moments of every process, and this one's are not among them")
        self.merged = RewardMoments.merged([self.merged, *owns])
        self.own = RewardMoments()

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON knows it."""
        return {"center": self.center, "merged": self.merged.to_json(), "own": self.own.to_json()}

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> RunningNormalization:
        """The normalization that `state` wrote. Raises `ValueError` where it is none."""
        try:
            center, merged, own = state["center"], state["merged"], state["own"]
        except KeyError as error:
            raise ValueError(f"the state of a running normalization lacks {error}") from None
        restored = cls(center=bool(center))
        restored.merged, restored.own = RewardMoments.from_json(merged), RewardMoments.from_json(own)
        return restored


def _check_finite(rewards: Rewards, consequence: str) -> None:
    for place, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise RewardInputError(f"reward {place} is {reward}; {consequence}: give None for what has no reward")


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
        RewardInputError: the lengths do not fit, or a reward is not finite.
    """
    _check_finite(rewards, "the advantages of its whole group would be NaN")
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
    moments = {group: RewardMoments.of(values) for group, values in members.items()}

    def advantage(reward: float, of_group: RewardMoments) -> float:
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
        moments = RewardMoments.of(values)
        return moments.mean - weight * moments.std if how == "mean_minus_std" else moments.mean

    items = zip(*rewards_of_models, strict=True)
    return [None if None in item else combined([reward for reward in item if reward is not None]) for item in items]


def place_at_last_token(rewards_B: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Put each reward at the last position that its row's mask keeps. Shape legend: B sequences, T tokens.

    Args:
        rewards_B: [B] or [B, 1], of a floating dtype.
        attention_mask_BT: [B, T], nonzero where a token counts: of the whole sequence or of its response, padded on
            either side.

    Returns:
        [B, T], zeros but for the rewards; dtype and device of `rewards_B`.

    Raises:
        RewardInputError: the shapes do not fit, the rewards are no floats, or a row keeps no token.
    """
    if rewards_B.ndim == 2 and rewards_B.shape[1] == 1:
        rewards_B = rewards_B[:, 0]
    if attention_mask_BT.ndim != 2 or rewards_B.shape != attention_mask_BT.shape[:1]:
        raise RewardInputError(
            f"rewards are [B] and the attention mask [B, T]; got {list(rewards_B.shape)} and "
            f"{list(attention_mask_BT.shape)}"
        )
    if not rewards_B.is_floating_point():
        raise RewardInputError(f"rewards are floats, not {str(rewards_B.dtype).removeprefix('torch.')}")
    kept_BT = attention_mask_BT.to(rewards_B.device) != 0
    if not bool(kept_BT.any(dim=1).all()):
        row = int((~kept_BT.any(dim=1)).nonzero()[0, 0])
        raise RewardInputError(f"row {row} of the attention mask keeps no token, so its reward has no place")
    positions_T = torch.arange(kept_BT.shape[1], device=rewards_B.device)
    last_B = (kept_BT * positions_T).amax(dim=1)
    placed_BT = torch.zeros(kept_BT.shape, dtype=rewards_B.dtype, device=rewards_B.device)
    return placed_BT.scatter_(1, last_B[:, None], rewards_B[:, None])
