"""Errors of the RLHF door, below the engine's tree.

    RaywardError
    |- RewardInputError        the arguments of a call do not fit together: lengths, shapes or dtypes
    |- PolicyTokenizerError    the policy's tokenizer is not declared or cannot be read
    `- RewardPoolError         the pool cannot do what is asked of it
       |- PoolStartError       its actors do not come up
       |- PoolClosedError      it was shut down, or who made it has ended
       |- ActorLostError       actors keep dying: over one part of a batch, or too often
       |- RewardTimeoutError   an answer did not come in time
       |- AsleepError          its weights are put away: wake it first
       |- SleepError           weights could not be put away or brought back; all are as they were
       `- WeightsUpdateError   new weights could not be taken; the old ones stay in every actor

One item that cannot be scored is a `ScoringError` of the engine, its place in `index`. Every class pickles.
"""

from __future__ import annotations

from serve_app.reward_model.errors import RaywardError


class RewardInputError(RaywardError):
    """The arguments of a call do not fit together; the message names the argument and, where there is one, the row."""


class PolicyTokenizerError(RaywardError):
    """The policy's tokenizer is not declared, cannot be read, or has no fast form."""


class RewardPoolError(RaywardError):
    """A pool of reward actors cannot do what is asked of it."""


class PoolStartError(RewardPoolError):
    """The actors do not come up; the message says what they wait for."""


class PoolClosedError(RewardPoolError):
    """The pool was shut down, or the process that made it has ended."""


class ActorLostError(RewardPoolError):
    """Actors died several times over one part of a batch, or more often than the pool allows."""


class RewardTimeoutError(RewardPoolError):
    """An answer did not come in time."""


class AsleepError(RewardPoolError):
    """The pool sleeps: its weights are not on the device."""


class SleepError(RewardPoolError):
    """Weights could not be put away or brought back. Every actor is as it was before the call."""


class WeightsUpdateError(RewardPoolError):
    """New weights could not be taken; every actor keeps the old ones. The message names what failed, and where."""
