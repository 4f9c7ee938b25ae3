"""A model whose trial at its start shows a rate far below what it does, as on a machine that is busy just then."""

from __future__ import annotations

import time
from collections.abc import Sequence

from serve_app.reward_model import ModelSpec, RewardModel, ScoringError

TRIAL_S = 0.5


def slow_trial(spec: ModelSpec) -> RewardModel:
    """The model of `spec`. Replicas call `scorer.score` for their trial and `scorer.outputs` for requests."""
    model = spec.load()
    score = model.scorer.score

    def slow(sequences: Sequence[Sequence[int]]) -> list[float | ScoringError]:
        time.sleep(TRIAL_S)
        return score(sequences)

    model.scorer.score = slow  # type: ignore[method-assign]
    return model
