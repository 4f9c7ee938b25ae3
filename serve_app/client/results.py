"""What calls of the endpoint return. Scores are the model's raw logits."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Comparison", "ModelInfo", "RankedConversation", "RankedResponse", "Ranking", "Score"]


@dataclass(frozen=True, slots=True)
class Score:
    """The model's scalar for one conversation, how many tokens it read, and whether it was shortened to fit."""

    value: float
    num_tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two scores; `margin` is the first less the second, `probability` its logistic (Bradley-Terry)."""

    scores: tuple[float, float]
    first_is_better: bool
    margin: float
    probability: float


@dataclass(frozen=True, slots=True)
class RankedConversation:
    """A conversation's place in the list that was asked for (`index`) and among its neighbours (`rank`, 0 the best)."""

    index: int
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """One result per conversation, in input order, and the indices from the best to the worst."""

    results: list[RankedConversation]
    order: list[int]

    @classmethod
    def of(cls, scores: list[float]) -> Ranking:
        """The ranking of `scores`; equal ones rank in input order, as the server has it."""
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        rank_of = {index: rank for rank, index in enumerate(order)}
        results = [RankedConversation(index, score, rank_of[index]) for index, score in enumerate(scores)]
        return cls(results=results, order=order)


@dataclass(frozen=True, slots=True)
class RankedResponse:
    """A response, its score, and its place in the list that was asked for."""

    index: int
    response: str
    score: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that is served, and the most tokens it reads in one conversation."""

    id: str
    max_tokens: int
