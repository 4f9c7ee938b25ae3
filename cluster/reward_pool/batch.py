"""One batch on its way: tokenised here in waves, cut into parts, scored by a pool's actors, put in order again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

from cluster.reward_pool.connection import PoolConnection
from cluster.reward_pool.dispatch import Part
from cluster.reward_pool.encoder import RewardEncoder
from cluster.reward_pool.errors import RewardPoolError
from serve_app.batching.parts import conversation_order, cut
from serve_app.batching.wire import TokenBatch
from serve_app.reward_model import Conversation, ScoringError
from serve_app.reward_model.scores import StepScores
from serve_app.reward_model.steps import EncodedSteps, SteppedAnswer, with_scores
from serve_app.reward_model.tokenizer import EncodedConversation

logger = logging.getLogger(__name__)

WAVE = 1024
"""Conversations that are put into the object store at once; those after them are tokenised meanwhile."""
MAX_PART_TOKENS = 16384
"""A part is what one forward pass takes, but no more than this: another caller may have to wait for it."""
MAX_MIXED = 3

Encoded = TypeVar("Encoded")


async def score_batch(
    parsed: Sequence[Conversation | ScoringError], encoder: RewardEncoder, connection: PoolConnection
) -> list[float | ScoringError]:
    """The score of each conversation, in order, or its error; all scores are of the same weights.

    Raises:
        RewardPoolError: the pool sleeps or is gone, its actors keep dying, or its weights keep changing.
    """

    def encode(places: Sequence[int]) -> list[EncodedConversation | ScoringError]:
        return encoder.encode([parsed[place] for place in places])

    batch = _Batch(conversation_order(parsed), encode, lambda item: [item.token_ids], connection)
    return [found[0] for found in await batch.outcomes()]


async def score_answers(
    answers: Sequence[SteppedAnswer | ScoringError], encoder: RewardEncoder, connection: PoolConnection
) -> list[StepScores | ScoringError]:
    """The scores of the steps of each answer, in order, or its error; all are of the same weights.

    Raises:
        ConversationError: the model scores no steps.
        RewardPoolError: as `score_batch`.
    """
    encoded: dict[int, EncodedSteps | ScoringError] = {}

    def encode(places: Sequence[int]) -> list[EncodedSteps | ScoringError]:
        found = encoder.encode_steps([answers[place] for place in places])
        encoded.update(zip(places, found, strict=True))
        return found

    prompts = [answer.prompt if isinstance(answer, SteppedAnswer) else answer for answer in answers]
    batch = _Batch(conversation_order(prompts), encode, lambda item: list(item.sequences), connection)
    found = await batch.outcomes()
    flat = [outcome for place, own in enumerate(found) if isinstance(encoded[place], EncodedSteps) for outcome in own]
    return with_scores([encoded[place] for place in range(len(answers))], flat)


class _Batch(Generic[Encoded]):
    """A batch on its way: items in an order, each with sequences of token ids, or with an error.

    `encode` takes places of items, in a thread; `sequences` gives those of an encoded one.
    """

    def __init__(
        self,
        order: Sequence[int],
        encode: Callable[[Sequence[int]], list[Encoded | ScoringError]],
        sequences: Callable[[Encoded], list[list[int]]],
        connection: PoolConnection,
    ) -> None:
        self._waves = [order[at : at + WAVE] for at in range(0, len(order), WAVE)]
        self._num_items = len(order)
        self._encode = encode
        self._sequences = sequences
        self._connection = connection

    async def outcomes(self) -> list[list[float | ScoringError]]:
        """What was found of each item's sequences, by the item's place; of one with an error that alone."""
        for _ in range(MAX_MIXED):
            outcomes, versions = await self._once()
            if len(versions) < 2:
                return [outcomes[place] for place in range(self._num_items)]
            logger.info("the weights changed during a batch of %d conversations; it is scored again", self._num_items)
        raise RewardPoolError(f"the weights changed during a batch, {MAX_MIXED} times in a row")

    async def _once(self) -> tuple[dict[int, list[float | ScoringError]], set[int]]:
        """The outcomes by place, and the versions of the weights that gave them."""
        outcomes: dict[int, list[float | ScoringError]] = {}
        versions: set[int] = set()

        def start(wave: Sequence[int]) -> asyncio.Task[list[Encoded | ScoringError]]:
            return asyncio.create_task(asyncio.to_thread(self._encode, wave))

        following = start(self._waves[0]) if self._waves else None
        try:
            for wave, next_wave in pairwise([*self._waves, None]):
                assert wave is not None
                assert following is not None
                encoded = dict(zip(wave, await following, strict=True))
                following = start(next_wave) if next_wave else None
                owned = {
                    place: [] if isinstance(item, ScoringError) else self._sequences(item)
                    for place, item in encoded.items()
                }
                found, used = await self._score([sequence for own in owned.values() for sequence in own])
                versions |= used
                left = iter(found)
                for place, item in encoded.items():
                    is_error = isinstance(item, ScoringError)
                    outcomes[place] = [item] if is_error else [next(left) for _ in owned[place]]  # type: ignore[list-item]
        finally:
            if following is not None:
                following.cancel()
        return outcomes, versions

    async def _score(self, ids: list[list[int]]) -> tuple[list[float | ScoringError], set[int]]:
        """The outcome of each sequence, in order, and the versions of the weights that gave them."""
        parts = cut(
            ids,
            max_tokens=min(self._connection.roster.token_budget, MAX_PART_TOKENS),
            num_processes=len(self._connection.roster.members),
        )
        travelling = [place for part in parts for place in part]
        bounds = pairwise(accumulate(map(len, parts), initial=0))
        batch = TokenBatch.of([ids[place] for place in travelling])
        replies = await self._connection.score(batch, [Part(first, stop) for first, stop in bounds])
        scored = (outcome for reply in replies for outcome in reply.outcomes())
        outcomes = dict(zip(travelling, scored, strict=True))
        return [outcomes[place] for place in range(len(ids))], {reply.weights_version for reply in replies}
