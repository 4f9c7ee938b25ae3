"""A model that runs in the replicas of a Serve application, as a `ConversationScorer`.

Conversations are tokenised here. What is sent is token ids, in parts that keep the candidates of one prompt together,
so that a replica computes the prompt once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from jobs.errors import ServedModelError
from jobs.replica_calls import ReplicaCalls
from serve_app.reward_model import Conversation, Score, ScoringError
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.checkpoint import fingerprint, resolve
from serve_app.reward_model.prefixes import together
from serve_app.reward_model.tokenizer import EncodedConversation, Tokenizer, Truncation

__all__ = ["ServedModel"]

ENCODED_AT_ONCE = 256
# A replica's batch takes in several parts; one of so many tokens keeps a large GPU busy by itself.
MAX_PART_TOKENS = 16384
MAX_PART_SEQUENCES = 1024


class ServedModel:
    """Scores conversations with a served model. Calls from several threads share the replicas.

    Raises:
        CheckpointError: the model's configuration and tokenizer cannot be had here.
        ServedModelError: they are not those of the replicas.
    """

    def __init__(
        self, model: str, revision: str | None, calls: ReplicaCalls, *, tokenizer_fingerprint: str, token_budget: int
    ) -> None:
        folder = resolve(model, revision, weights=False)
        if fingerprint(folder, weights=False) != tokenizer_fingerprint:
            raise ServedModelError(
                f"configuration or tokenizer of {model} on {os.uname().nodename} are not those of the replicas; "
                "serve it with a revision, or from a shared folder"
            )
        self._tokenizer = Tokenizer.from_pretrained(folder, config=DecoderConfig.from_folder(folder))
        self._calls = calls
        self._part_tokens = min(token_budget, MAX_PART_TOKENS)

    def outcomes(
        self, conversations: Sequence[Conversation], *, truncation: Truncation, max_tokens: int | None
    ) -> list[Score | ScoringError]:
        """The score of each conversation, in order, or the error that it alone has.

        Raises:
            ScorerError: the replicas make no progress, keep dying, or serve another model by now.
        """
        order = together(len(conversations), lambda place: conversations[place].prompt or place)
        outcomes: dict[int, Score | ScoringError] = {}
        pending: list[tuple[list[tuple[int, EncodedConversation]], Future[list[float | ScoringError]]]] = []
        try:
            for part in self._parts(conversations, order, truncation, max_tokens, outcomes):
                pending.append((part, self._calls.submit([encoded.token_ids for _, encoded in part])))
            for part, answer in pending:
                for (place, encoded), value in zip(part, answer.result(), strict=True):
                    outcomes[place] = _outcome(value, encoded)
        finally:
            for _, answer in pending:
                answer.cancel()
        return [outcomes[place] for place in range(len(conversations))]

    def _parts(
        self,
        conversations: Sequence[Conversation],
        order: Sequence[int],
        truncation: Truncation,
        max_tokens: int | None,
        failed: dict[int, Score | ScoringError],
    ) -> Iterator[list[tuple[int, EncodedConversation]]]:
        """Encoded conversations and their places, in parts; what cannot be encoded goes to `failed`."""
        part: list[tuple[int, EncodedConversation]] = []
        tokens = 0
        for first in range(0, len(order), ENCODED_AT_ONCE):
            places = order[first : first + ENCODED_AT_ONCE]
            batch = [conversations[place] for place in places]
            encoded = self._tokenizer.encode_batch(batch, truncation=truncation, max_tokens=max_tokens)
            for place, item in zip(places, encoded, strict=True):
                if not isinstance(item, EncodedConversation):
                    failed[place] = item
                    continue
                length = len(item.token_ids)
                if part and (tokens + length > self._part_tokens or len(part) == MAX_PART_SEQUENCES):
                    yield part
                    part, tokens = [], 0
                part.append((place, item))
                tokens += length
        if part:
            yield part


def _outcome(value: float | ScoringError, encoded: EncodedConversation) -> Score | ScoringError:
    return value if isinstance(value, ScoringError) else Score(value, len(encoded.token_ids), encoded.truncated)
