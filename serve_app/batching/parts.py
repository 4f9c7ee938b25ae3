"""A list of token-id sequences cut into parts for several processes, one prompt's candidates in one part."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from serve_app.reward_model.conversation import Conversation
from serve_app.reward_model.errors import ScoringError
from serve_app.reward_model.prefixes import MIN_SHARED_TOKENS, together

MIN_PART_TOKENS = 512
"""Below so many tokens a part costs more in messages than another process saves by computing it."""
MAX_REPEATS = 16
"""Tokens of a part with every sequence counted whole, over its bound, at most: shared tokens are computed once, and
still travel and wait in queues as often as there are candidates."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Sequences of one prompt, by place: `num_shared` tokens that all begin with, and what each has of its own."""

    members: list[int]
    num_shared: int
    own: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads of them in one part."""
        return self.num_shared + sum(self.own)

    @property
    def whole_tokens(self) -> int:
        """Their tokens, each sequence counted whole."""
        return self.num_shared * len(self.members) + sum(self.own)


def prompt_keys(parsed: Sequence[Conversation | ScoringError]) -> list[Hashable]:
    """The key of each item's prompt: candidates for one prompt have equal keys, all else has a key of its own."""
    # A conversation without a prompt is nobody's candidate.
    return [(isinstance(item, Conversation) and item.prompt) or place for place, item in enumerate(parsed)]


def cut(
    sequences: Sequence[Sequence[int]], prompts: Sequence[Hashable], *, max_tokens: int, num_processes: int = 1
) -> list[list[int]]:
    """The places of each part's sequences.

    Tokens that a prompt's candidates begin with are counted once, as the model reads them. A part has about a
    process's share of the list, at most `max_tokens`; of a prompt whose candidates exceed that, several parts are
    made, and a sequence that exceeds it is a part of its own.

    Args:
        sequences: token ids.
        prompts: the key of each sequence's prompt, as `prompt_keys` makes them.
        max_tokens: the most tokens of a part; with every sequence counted whole, `MAX_REPEATS` times as many.
        num_processes: how many processes share the list; 1 fills every part.
    """
    pieces = [piece for group in _groups(sequences, prompts) for piece in _pieces(group, max_tokens)]
    share = math.ceil(sum(piece.num_tokens for piece in pieces) / max(1, num_processes))
    limit = max(min(share, max_tokens), min(MIN_PART_TOKENS, max_tokens))
    parts: list[list[int]] = []
    tokens = whole_tokens = 0
    for piece in pieces:
        tokens += piece.num_tokens
        whole_tokens += piece.whole_tokens
        if not parts or tokens > limit or whole_tokens > MAX_REPEATS * max_tokens:
            parts.append([])
            tokens, whole_tokens = piece.num_tokens, piece.whole_tokens
        parts[-1] += piece.members
    return parts


def _groups(sequences: Sequence[Sequence[int]], prompts: Sequence[Hashable]) -> Iterator[_Piece]:
    members: list[int] = []
    for place in together(len(sequences), prompts.__getitem__):
        if members and prompts[members[0]] != prompts[place]:
            yield _group(sequences, members)
            members = []
        members.append(place)
    if members:
        yield _group(sequences, members)


def _group(sequences: Sequence[Sequence[int]], members: list[int]) -> _Piece:
    first = np.asarray(sequences[members[0]])
    num_shared = len(first) - 1 if len(members) > 1 else 0
    for member in members[1:]:
        other = np.asarray(sequences[member])
        shortest = min(num_shared, len(other) - 1)
        differs = np.flatnonzero(first[:shortest] != other[:shortest])
        num_shared = int(differs[0]) if len(differs) else shortest
    num_shared = num_shared if num_shared >= MIN_SHARED_TOKENS else 0
    return _Piece(members, num_shared, [len(sequences[member]) - num_shared for member in members])


def _pieces(group: _Piece, max_tokens: int) -> Iterator[_Piece]:
    """The group itself, or pieces within the bounds that repeat its shared tokens."""
    members: list[int] = []
    own: list[int] = []
    own_tokens = 0
    for member, length in zip(group.members, group.own, strict=True):
        tokens = group.num_shared + own_tokens + length
        if members and max(tokens, (tokens + group.num_shared * len(members)) / MAX_REPEATS) > max_tokens:
            yield _Piece(members, group.num_shared, own)
            members, own, own_tokens = [], [], 0
        members.append(member)
        own.append(length)
        own_tokens += length
    yield _Piece(members, group.num_shared, own)
