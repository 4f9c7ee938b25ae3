"""Count, mean and variance of numbers that come in pieces, in several processes: merged without loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Moments"]


@dataclass(frozen=True, slots=True)
class Moments:
    """How many numbers there were, their mean, and the sum of their squared distances from it (`m2`), in float64.

    Merging is the parallel variance of Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm
    for computing sample variances": two sets of numbers have the moments of the whole, whichever way it was cut.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Moments:
        """The moments of `values`; they must be finite."""
        if not values:
            return cls()
        mean = math.fsum(values) / len(values)
        return cls(len(values), mean, math.fsum((value - mean) ** 2 for value in values))

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments:
        """The moments of all the numbers that `parts` describe, which must have none in common."""
        total = cls()
        for part in parts:
            total = total.with_others(part)
        return total

    def with_others(self, other: Moments) -> Moments:
        """The moments of these numbers and the other's."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        return Moments(count, mean, self.m2 + other.m2 + apart * apart * self.count * other.count / count)

    @property
    def std(self) -> float:
        """The population's standard deviation: 0 for fewer than two numbers."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def to_json(self) -> dict[str, float]:
        """For a checkpoint; `from_json` reads it back without loss."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_json(cls, state: Mapping[str, float]) -> Moments:
        """What `to_json` wrote. Raises `ValueError` where it is none."""
        try:
            found = cls(int(state["count"]), float(state["mean"]), float(state["m2"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"moments are {{'count', 'mean', 'm2'}}; {error} is missing or no number") from error
        if found.count < 0 or found.m2 < 0 or not math.isfinite(found.mean + found.m2):
            raise ValueError(f"no numbers have these moments: {found}")
        return found
