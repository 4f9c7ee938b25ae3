"""Conversations, rendered texts and a policy's ids as callers hand them in: checked, read and made token ids of.

It runs where the caller is, so that nothing but token ids travels to the actors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

from torch import Tensor

from cluster.reward_pool.errors import PolicyTokenizerError, RewardInputError
from cluster.reward_pool.policy import PolicyText, unpadded, without_thinking
from serve_app.reward_model import Conversation, ConversationError, ConversationLike, Message, ModelSpec, ScoringError
from serve_app.reward_model.rendered_text import RenderedTextError
from serve_app.reward_model.scores import Aggregate, StepScores
from serve_app.reward_model.steps import EncodedSteps, StepEncoder, SteppedAnswer
from serve_app.reward_model.tokenizer import EncodedConversation, Truncation

logger = logging.getLogger(__name__)

OnError = Literal["raise", "null"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encoding:
    """How conversations become token ids.

    Args:
        policy_tokenizer: the policy's tokenizer, a folder or a Hugging Face id; `forward` needs it.
        truncation: what is done with a conversation over the limit: see `Tokenizer.encode_batch`.
        max_tokens: a limit below the model's own.
        strip_thinking: leave `<think>` blocks of assistants' messages out.
        keep_default_system: keep the system prompt that the policy's template writes unasked.
        strict: refuse what is scored with a warning otherwise: see `conversation.warnings_of`.
    """

    policy_tokenizer: Any = None
    truncation: Truncation = "error"
    max_tokens: int | None = None
    strip_thinking: bool = False
    keep_default_system: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if self.truncation not in ("error", "right", "left"):
            raise RewardInputError(f"truncation is 'error', 'right' or 'left', not {self.truncation!r}")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise RewardInputError(f"max_tokens is at least 2 (BOS and the reward token), not {self.max_tokens}")


class RewardEncoder:
    """Reads and tokenises for one reward model: its small files are enough.

    Raises:
        CheckpointError: they cannot be had.
    """

    def __init__(self, spec: ModelSpec, encoding: Encoding) -> None:
        self._encoding = encoding
        self._warned: set[str] = set()
        self._config, self._tokenizer = spec.read()

    @cached_property
    def _policy(self) -> PolicyText | None:
        declared = self._encoding.policy_tokenizer
        if declared is None:
            return None
        return PolicyText.from_pretrained(declared, keep_default_system=self._encoding.keep_default_system)

    def check_policy(self) -> None:
        """Read the policy's tokenizer, where one is declared. Raises `PolicyTokenizerError` if it cannot be."""
        self._policy  # noqa: B018

    def conversations(self, sources: Sequence[ConversationLike]) -> list[Conversation | ScoringError]:
        """Each checked, or what is wrong with it. Raises `RewardInputError` where `sources` is no list of them."""
        if isinstance(sources, Conversation | str | Mapping) or not isinstance(sources, Sequence):
            raise RewardInputError(f"a list of conversations is wanted, not {type(sources).__name__}")
        first = sources[0] if sources else None
        if isinstance(first, Message) or (isinstance(first, Mapping) and "messages" not in first):
            raise RewardInputError("a list of conversations is wanted, not one conversation: put it into a list")
        return [_outcome(Conversation.parse, source) for source in sources]

    def texts(self, texts: Sequence[str]) -> list[Conversation | ScoringError]:
        """Each rendered text read, or why it cannot be: in the policy's template or ChatML, or in the model's."""
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise RewardInputError(f"a list of texts is wanted, not {type(texts).__name__}")
        return [_outcome(self._read, text) for text in texts]

    def policy_ids(
        self,
        sequences: Tensor,
        attention_mask: Tensor | None,
        packed_seq_lens: Sequence[int] | Tensor | None,
        pad_sequence: bool,
    ) -> list[Conversation | ScoringError]:
        """Each sequence of the policy's ids decoded and read, or why it cannot be: see `policy_ids.unpadded`."""
        if self._policy is None:
            raise PolicyTokenizerError(
                "forward decodes the policy's token ids: declare policy_tokenizer, a folder or a Hugging Face id"
            )
        ids = unpadded(sequences, attention_mask, packed_seq_lens, pad_sequence=pad_sequence)
        return list(self._policy.of_ids(ids))

    def encode(self, parsed: Sequence[Conversation | ScoringError]) -> list[EncodedConversation | ScoringError]:
        """The token ids of each conversation, in order, or the error that keeps it from being scored."""
        ready = [self._thoughtless(item) for item in parsed if isinstance(item, Conversation)]
        encoding = self._encoding
        encoded = list(
            self._tokenizer.encode_batch(
                ready, truncation=encoding.truncation, max_tokens=encoding.max_tokens, strict=encoding.strict
            )
        )
        self._warn(encoded)
        left = iter(encoded)
        return [next(left) if isinstance(item, Conversation) else item for item in parsed]

    def encode_steps(self, answers: Sequence[SteppedAnswer | ScoringError]) -> list[EncodedSteps | ScoringError]:
        """The sequences of each answer in steps, in order, or the error that keeps it from being scored.

        Raises `ConversationError` where the model scores no steps.
        """
        encoding = self._encoding
        ready = [
            replace(item, prompt=self._thoughtless(item.prompt)) if isinstance(item, SteppedAnswer) else item
            for item in answers
        ]
        encoded = self._steps.encode_batch(ready, max_tokens=encoding.max_tokens, strict=encoding.strict)
        self._warn(encoded)
        return encoded

    @cached_property
    def _steps(self) -> StepEncoder:
        return StepEncoder.of(self._config, self._tokenizer)

    def _warn(self, encoded: Sequence[EncodedConversation | EncodedSteps | ScoringError]) -> None:
        """Log each kind of warning once: a trainer's batches would repeat it for ever."""
        for place, item in enumerate(encoded):
            for warning in () if isinstance(item, ScoringError) else item.warnings:
                kind = warning.partition(":")[0]
                if kind not in self._warned:
                    self._warned.add(kind)
                    logger.warning("conversation %d of a batch: %s (this kind is told once)", place, warning)

    def _read(self, text: str) -> Conversation:
        if not isinstance(text, str):
            raise ConversationError(f"a rendered text is a string, not {type(text).__name__}")
        if self._policy is not None:
            try:
                return self._policy.of_text(text)
            except RenderedTextError:
                pass  # perhaps the model's own template; if not, that reader says what was expected
        return self._tokenizer.read_rendered(text)

    def _thoughtless(self, conversation: Conversation) -> Conversation:
        if not self._encoding.strip_thinking:
            return conversation
        messages = (
            replace(message, content=without_thinking(message.content)) if message.role == "assistant" else message
            for message in conversation.messages
        )
        return Conversation(tuple(messages), conversation.reference)


def values_of(outcomes: Sequence[T | ScoringError], on_error: OnError) -> list[T | None]:
    """What was found of each item; of one without a score null or, where errors are to be raised, the first error, its
    place told.
    """
    if on_error not in ("raise", "null"):
        raise RewardInputError(f"on_error is 'raise' or 'null', not {on_error!r}")
    for place, outcome in enumerate(outcomes):
        if isinstance(outcome, ScoringError) and on_error == "raise":
            outcome.index = place
            raise outcome
    return [None if isinstance(outcome, ScoringError) else outcome for outcome in outcomes]


def step_values(
    outcomes: Sequence[StepScores | ScoringError], aggregate: Aggregate | None, on_error: OnError
) -> list[Any]:
    """The scores of each answer's steps, or what the aggregate makes of them; of one without a score as `values_of`."""
    found = values_of(outcomes, on_error)
    if aggregate is None:
        return [scores and list(scores.values) for scores in found]
    return [None if scores is None else scores.aggregate(aggregate) for scores in found]


def _outcome(read: Any, source: Any) -> Conversation | ScoringError:
    try:
        conversation: Conversation = read(source)
    except ScoringError as error:
        return error
    return conversation
