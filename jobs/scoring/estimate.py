"""Rows, tokens and hours that scoring a corpus would take: tokens from rows all over it, hours from a rate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.corpus.conversations import SystemPrompt
from jobs.corpus.files import Corpus
from jobs.corpus.reader import UnitReader
from jobs.corpus.readings import Reading
from jobs.options import EngineOptions
from jobs.scoring.preview import row_conversations, tokenizer_of
from jobs.scoring.spec import spec_named
from serve_app.reward_model.conversation import Conversation
from serve_app.reward_model.errors import ConversationError
from serve_app.reward_model.tokenizer import EncodedConversation

STRETCHES, STRETCH_ROWS = 64, 4
MEASURED_S = 10.0
MEASURED_AT_ONCE = 32

Row = list[Conversation | ConversationError]
"""The conversations of one row."""


@dataclass(frozen=True, slots=True)
class TokenEstimate:
    """Tokens of a corpus: the estimate, its 95 % interval, and the rows that it was made from and that have errors."""

    tokens: float
    low: float
    high: float
    sampled_rows: int
    bad_rows: int

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int | None]], *, num_rows: int) -> TokenEstimate:
        """The estimate from stretches of rows, each with the tokens of its rows, None for one with an error.

        Stretches are what is drawn, so that the interval is that of their means: rows that stand together are alike. A
        corpus that was read whole has no interval.
        """
        means = np.array([np.mean([row or 0 for row in stretch]) for stretch in tokens if stretch], np.float64)
        rows = [row for stretch in tokens for row in stretch]
        total = float(np.mean([row or 0 for row in rows])) * num_rows if rows else 0.0
        spread = 1.96 * float(means.std(ddof=1)) / np.sqrt(len(means)) * num_rows if len(means) > 1 else 0.0
        spread = 0.0 if len(rows) >= num_rows else spread
        bad = sum(row is None for row in rows)
        return cls(total, max(0.0, total - spread), total + spread, len(rows), bad)


def estimate(
    corpus: Corpus,
    reading: Reading,
    system_prompt: SystemPrompt,
    options: EngineOptions,
    *,
    share: float = 1.0,
    tokens_per_s: float | None = None,
) -> Iterator[str]:
    """Lines that tell the rows, the tokens and the hours; `share` is the part of the rows that would be scored.

    Raises:
        CheckpointError: the model cannot be read.
        CorpusError: the rows cannot be read.
    """
    num_rows = round(corpus.num_rows * share)
    yield f"{num_rows:,} rows, files: {len(corpus.files):,}"
    stretches = list(_stretches(corpus, reading, system_prompt))
    found = TokenEstimate.of(_tokens(stretches, options), num_rows=num_rows)
    bad = f"; {found.bad_rows:,} of them have an error" if found.bad_rows else ""
    interval = f"95 % interval {found.low:,.0f} to {found.high:,.0f}, " if found.high > found.low else ""
    yield f"about {found.tokens:,.0f} tokens ({interval}from {found.sampled_rows:,} rows{bad})"
    source = "as given"
    if tokens_per_s is None:
        tokens_per_s, source = _measured(stretches, options)
    if tokens_per_s:
        low, middle, high = (count / tokens_per_s / 3600 for count in (found.low, found.tokens, found.high))
        span = f" ({low:,.3g} to {high:,.3g})" if high > low else ""
        yield f"about {middle:,.3g} hours{span} of one actor at {tokens_per_s:,.0f} tokens/s, {source}"


def _stretches(corpus: Corpus, reading: Reading, system_prompt: SystemPrompt) -> Iterator[list[Row]]:
    """Rows from all over the corpus, a few together."""
    for _, table in UnitReader(corpus.filesystem).read(corpus.stretches(STRETCHES, STRETCH_ROWS)):
        if isinstance(table, Exception):
            raise table
        yield [list(row.values()) for row in row_conversations(table, reading, system_prompt)]


def _tokens(stretches: Sequence[Sequence[Row]], options: EngineOptions) -> list[list[int | None]]:
    tokenizer = tokenizer_of(options)

    def of(row: Row) -> int | None:
        encoded = tokenizer.encode_batch(
            row, truncation=options.truncation, max_tokens=options.max_tokens, strict=options.strict
        )
        counts = [len(one.token_ids) for one in encoded if isinstance(one, EncodedConversation)]
        return sum(counts) if len(counts) == len(row) else None

    return [[of(row) for row in stretch] for stretch in stretches]


def _measured(stretches: Sequence[Sequence[Row]], options: EngineOptions) -> tuple[float | None, str]:
    """Tokens that the model scores a second in this process, after a first batch, and how that was found."""
    every = [one for stretch in stretches for row in stretch for one in row if isinstance(one, Conversation)]
    if not every:
        return None, ""
    model = spec_named(options, options.device).load()

    def scored(conversations: Sequence[Conversation]) -> int:
        outcomes = model.outcomes(
            conversations, truncation=options.truncation, max_tokens=options.max_tokens, strict=options.strict
        )
        return sum(getattr(outcome, "num_tokens", 0) for outcome in outcomes)

    scored(every[:1])
    started, tokens, place = time.monotonic(), 0, 0
    while place < len(every) and time.monotonic() - started < MEASURED_S:
        tokens += scored(every[place : place + MEASURED_AT_ONCE])
        place += MEASURED_AT_ONCE
    return tokens / (time.monotonic() - started), f"measured here on {model.device.type}"
