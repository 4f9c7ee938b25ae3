"""One batch on its way: tokenised here in waves, cut into parts, scored by a pool's actors, put in order again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from itertools import accumulate, pairwise

from cluster.reward_pool.connection import PoolConnection
from cluster.reward_pool.dispatch import Part
from cluster.reward_pool.encoder import RewardEncoder
from cluster.reward_pool.errors import RewardPoolError
from serve_app.batching.parts import conversation_order, cut
from serve_app.batching.wire import TokenBatch
from serve_app.reward_model import Conversation, ScoringError
from serve_app.reward_model.tokenizer import EncodedConversation

logger = logging.getLogger(__name__)

WAVE = 1024
"""Conversations that are put into the object store at once; those after them are tokenised meanwhile."""
MAX_PART_TOKENS = 16384
"""A part is what one forward pass takes, but no more than this: another caller may have to wait for it."""
MAX_MIXED = 3

Outcomes = dict[int, float | ScoringError]


async def score_batch(
    parsed: Sequence[Conversation | ScoringError], encoder: RewardEncoder, connection: PoolConnection
) -> list[float | ScoringError]:
    """The score of each conversation, in order, or its error; all scores are of the same weights.

    Raises:
        RewardPoolError: the pool sleeps or is gone, its actors keep dying, or its weights keep changing.
    """
    for _ in range(MAX_MIXED):
        outcomes, versions = await _score_once(parsed, encoder, connection)
        if len(versions) < 2:
            return [outcomes[place] for place in range(len(parsed))]
        logger.info("the weights changed during a batch of %d conversations; it is scored again", len(parsed))
    raise RewardPoolError(f"the weights changed during a batch, {MAX_MIXED} times in a row")


async def _score_once(
    parsed: Sequence[Conversation | ScoringError], encoder: RewardEncoder, connection: PoolConnection
) -> tuple[Outcomes, set[int]]:
    """The outcome of each item by its place, and the versions of the weights that gave them."""
    order = conversation_order(parsed)
    waves = [order[at : at + WAVE] for at in range(0, len(order), WAVE)]
    outcomes: Outcomes = {}
    versions: set[int] = set()

    def encode(wave: list[int]) -> asyncio.Task[list[EncodedConversation | ScoringError]]:
        return asyncio.create_task(asyncio.to_thread(encoder.encode, [parsed[place] for place in wave]))

    following = encode(waves[0]) if waves else None
    try:
        for wave, next_wave in pairwise([*waves, None]):
            assert wave is not None
            assert following is not None
            encoded = dict(zip(wave, await following, strict=True))
            following = encode(next_wave) if next_wave else None
            outcomes |= {place: item for place, item in encoded.items() if isinstance(item, ScoringError)}
            ids = {place: item.token_ids for place, item in encoded.items() if isinstance(item, EncodedConversation)}
            versions |= await _score_wave(ids, connection, outcomes)
    finally:
        if following is not None:
            following.cancel()
    return outcomes, versions


async def _score_wave(ids: dict[int, list[int]], connection: PoolConnection, outcomes: Outcomes) -> set[int]:
    """Score token ids by place into `outcomes`; the versions of the weights that did it."""
    places = list(ids)
    parts = cut(
        list(ids.values()),
        max_tokens=min(connection.roster.token_budget, MAX_PART_TOKENS),
        num_processes=len(connection.roster.members),
    )
    travelling = [places[index] for part in parts for index in part]
    bounds = pairwise(accumulate(map(len, parts), initial=0))
    batch = TokenBatch.of([ids[place] for place in travelling])
    replies = await connection.score(batch, [Part(first, stop) for first, stop in bounds])
    scored = (outcome for reply in replies for outcome in reply.outcomes())
    outcomes |= zip(travelling, scored, strict=True)
    return {reply.weights_version for reply in replies}
