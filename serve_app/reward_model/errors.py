"""What can go wrong while scoring, as one tree.

    RaywardError
    |- ScoringError                  one item cannot be scored
    |  |- ConversationError          a conversation is malformed
    |  |  |- ConversationTooLongError   it has more tokens than the limit
    |  |  `- MalformedConversationError  it could be scored, but `strict` refuses what looks wrong in it
    |  |- TokenIdsError              a token-id sequence is empty, too long or outside the vocabulary
    |  |- NonFiniteScoreError        the model returned NaN or infinity for one conversation
    |  `- DeviceMemoryError          one conversation alone does not fit the device's memory
    |- DeviceError                   the device that was asked for is not there
    `- CheckpointError               a model cannot be loaded
       |- UnsupportedArchitectureError
       |- UnsupportedDeviceError     the device cannot do what is asked of it, such as fp8
       |- ChangedFilesError          the files are not those that were named by their fingerprint
       `- WeightError                a weight is missing, surplus or misshapen

Every class pickles, so that errors cross process borders whole.
"""

from __future__ import annotations


class RaywardError(Exception):
    """Base of every error rayward raises on purpose."""


class ScoringError(RaywardError):
    """One item cannot be scored; its neighbours can. `index` is its place in the list that was asked for."""

    index: int | None = None

    def __str__(self) -> str:
        reason = super().__str__()
        return reason if self.index is None else f"item {self.index}: {reason}"


class ConversationError(ScoringError):
    """A conversation is malformed; the message says which part."""


class ConversationTooLongError(ConversationError):
    """A conversation has `num_tokens` tokens where `max_tokens` are allowed."""

    def __init__(self, num_tokens: int, max_tokens: int, detail: str = "") -> None:
        self.num_tokens = num_tokens
        self.max_tokens = max_tokens
        self.detail = detail
        hint = detail or "ask for truncation='right' or truncation='left' to shorten it"
        super().__init__(f"conversation has {num_tokens} tokens, the limit is {max_tokens}; {hint}")

    def __reduce__(self) -> tuple[type[ConversationTooLongError], tuple[int, int, str], dict[str, object]]:
        return type(self), (self.num_tokens, self.max_tokens, self.detail), self.__dict__


class MalformedConversationError(ConversationError):
    """A conversation could be scored, but the caller asked to refuse what looks wrong in it (`strict`)."""


class TokenIdsError(ScoringError):
    """A token-id sequence is empty, over the model's length or outside the vocabulary."""


class NonFiniteScoreError(ScoringError):
    """The model returned NaN or infinity for a conversation, alone in its batch."""


class DeviceMemoryError(ScoringError):
    """A conversation does not fit the device's memory, not even alone."""


class DeviceError(RaywardError):
    """The device that was asked for does not exist, or this machine has none such."""


class CheckpointError(RaywardError):
    """A model cannot be loaded: files, configuration or tokenizer."""


class UnsupportedArchitectureError(CheckpointError):
    """The checkpoint's architecture or one of its options is not supported; the message names what is."""


class UnsupportedDeviceError(CheckpointError):
    """The device cannot do what is asked of it, such as multiplying 8-bit floats; the message names what can."""


class ChangedFilesError(CheckpointError):
    """The files of a model are not those of the fingerprint that the caller holds on to."""


class WeightError(CheckpointError):
    """A weight is missing, surplus or misshapen; the message names it."""
