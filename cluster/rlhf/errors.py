"""What can go wrong between a trainer and its rewards, beside `cluster/reward_errors.py` and the engine's own errors.

RaywardError
|- RewardSourceError        no source of rewards is named or reachable, or its answer does not fit the question
|- FrameworkError           a trainer is not installed, or is used in a way that cannot work
`- TrainingError            an actor of a training program died, or gave no answer in time
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from serve_app.reward_model.errors import RaywardError


class RewardSourceError(RaywardError):
    """There is no source of rewards, it gives no answer, or one that does not fit the question."""


class FrameworkError(RaywardError):
    """A trainer is not installed or is used in a way that cannot work; the message says what to do."""


class TrainingError(RaywardError):
    """An actor of a training program died, or gave no answer in time."""


def framework_module(name: str, *, install: str) -> Any:
    """The module of that name. Raises FrameworkError, which tells how to `install` it, where it cannot be imported."""
    try:
        return import_module(name)
    except ImportError as error:
        raise FrameworkError(f"{name} cannot be imported ({error}): {install}") from error
