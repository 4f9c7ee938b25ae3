"""A score, and the orders that follow from several: plain numbers, no model."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Outputs: TypeAlias = Sequence[float]
"""What a model says of one sequence: its score, then the attributes of `HeadConfig.attributes`."""


@dataclass(frozen=True, slots=True)
class Score:
    """The model's raw scalar for one conversation, its length in tokens, and whether it was shortened to fit.

    `num_tokens` counts the conversation as it is rendered and encoded, which is what limits apply to: padding tokens
    behind the place where the score is read are among them. `warnings` say what looks wrong in the conversation, each
    with its kind in front: see `conversation.warnings_of`. `attributes` are what a gating head weighs to make the
    scalar, by name; other models have none.
    """

    value: float
    num_tokens: int
    truncated: bool = False
    warnings: tuple[str, ...] = ()
    attributes: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class StepScores:
    """A process reward model's probability for each step of an answer that it is good, in order; the tokens read up to
    the last one, and what looks wrong in the conversation: see `conversation.warnings_of`.
    """

    values: tuple[float, ...]
    num_tokens: int
    warnings: tuple[str, ...] = ()

    def aggregate(self, name: Aggregate) -> float:
        """One number for the answer: see `AGGREGATES`."""
        return AGGREGATES[name](self.values)


Aggregate = Literal["product", "minimum", "last"]
AGGREGATES: Mapping[Aggregate, Callable[[Sequence[float]], float]] = {
    "product": math.prod,
    "minimum": min,
    "last": operator.itemgetter(-1),
}
"""Ways to make one number of the scores of an answer's steps. Which one is best depends on the model, so none is taken
unasked."""


def order(scores: Sequence[float]) -> list[int]:
    """Indices of `scores` from the highest to the lowest; equal scores keep their input order."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def ranks(scores: Sequence[float]) -> list[int]:
    """The 0-based rank of each score, 0 for the highest; equal scores rank in input order.

    This is what the InternLM2-Reward model card documents for `rank`; its code returns `order` instead, which
    agrees for two scores and differs for most lists of three or more.
    """
    result = [0] * len(scores)
    for rank, index in enumerate(order(scores)):
        result[index] = rank
    return result
