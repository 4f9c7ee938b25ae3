"""Accuracy of the embedded model on pairs of the kinds that it was taught, of combinations that it never saw.

Pairs are made by the engine's `lessons`, the same each time. Of a pair the longer answer is the right one half the
time, so a model that goes by length gets half of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from serve_app.reward_model import lessons
from serve_app.reward_model.lessons import KINDS, LessonPair

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel

NUM_PAIRS = 200
SEED = 3
LEAST_OF_A_KIND = 0.75
LEAST_OF_ALL = 0.9


@dataclass(frozen=True, slots=True)
class KindAccuracy:
    """The shares of a kind's pairs ranked right: of all, of those whose right answer is longer, and shorter."""

    kind: str
    num_pairs: int
    accuracy: float
    if_longer: float
    if_shorter: float

    @classmethod
    def of(cls, kind: str, pairs: Sequence[LessonPair], right: Sequence[bool]) -> KindAccuracy:
        """The shares of pairs, of which `right` says whether each is ranked right."""
        sides: dict[bool, list[bool]] = {True: [], False: []}
        for pair, is_right in zip(pairs, right, strict=True):
            sides[len(pair.chosen) > len(pair.rejected)].append(is_right)
        return cls(kind, len(pairs), fmean(right), fmean(sides[True]), fmean(sides[False]))


def accuracies(model: RewardModel, *, num_pairs: int) -> list[KindAccuracy]:
    """The accuracy on each kind, in the order of `KINDS`."""
    pairs = [pair for kind in KINDS for pair in lessons.pairs(kind, num_pairs, seed=SEED)]
    chats = [pair.question.chat(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    scores = model.get_scores(chats)
    right = [chosen > rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]
    return [
        KindAccuracy.of(kind, pairs[start : start + num_pairs], right[start : start + num_pairs])
        for start, kind in zip(range(0, len(pairs), num_pairs), KINDS, strict=True)
    ]


def total(found: Sequence[KindAccuracy]) -> KindAccuracy:
    """All kinds together, each with the same weight."""
    shares = [fmean(kind_shares) for kind_shares in zip(*(_shares(kind) for kind in found), strict=True)]
    return KindAccuracy("all", sum(kind.num_pairs for kind in found), *shares)


def _shares(found: KindAccuracy) -> tuple[float, float, float]:
    return found.accuracy, found.if_longer, found.if_shorter


def is_as_taught(found: Sequence[KindAccuracy]) -> bool:
    """Whether every kind and all of them reach what the embedded model is to reach."""
    return total(found).accuracy >= LEAST_OF_ALL and all(kind.accuracy >= LEAST_OF_A_KIND for kind in found)


def table(found: Sequence[KindAccuracy]) -> Iterator[str]:
    """A line for each kind, and one for all."""
    yield f"{'kind':<12}{'pairs':>8}{'right':>9}{'if longer':>12}{'if shorter':>12}"
    for kind in (*found, total(found)):
        shares = f"{kind.accuracy:>9.1%}{kind.if_longer:>12.1%}{kind.if_shorter:>12.1%}"
        yield f"{kind.kind:<12}{kind.num_pairs:>8,}{shares}"
    yield "if longer, if shorter: the half of the pairs whose right answer is the longer, the shorter of the two"
