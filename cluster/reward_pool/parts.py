"""A batch of token-id sequences -> parts of bounded size for several actors, one prompt's candidates in one part."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from serve_app.reward_model.prefixes import MIN_SHARED_TOKENS, together

__all__ = ["MIN_PART_TOKENS", "plan_parts"]

# Below so many tokens a part costs more in messages than another actor saves by computing it.
MIN_PART_TOKENS = 512


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences of one prompt, by place: `num_shared` tokens that all begin with, and what each has of its own."""

    members: list[int]
    num_shared: int
    own: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads of them in one part."""
        return self.num_shared + sum(self.own)


def plan_parts(
    sequences: Sequence[Sequence[int]], prompts: Sequence[Hashable], *, max_tokens: int, num_actors: int
) -> list[list[int]]:
    """The places of each part's sequences.

    Tokens that a prompt's candidates begin with are counted once, as the model reads them. A part has about an
    actor's share of the batch, at most `max_tokens`; of a prompt whose candidates exceed that, several parts are made,
    and a sequence that exceeds it is a part of its own.

    Args:
        sequences: token ids.
        prompts: what tells each sequence's prompt; equal ones are candidates for the same.
        max_tokens: the most tokens of a part.
        num_actors: how many actors share the batch.
    """
    groups = list(_groups(sequences, prompts))
    share = math.ceil(sum(group.num_tokens for group in groups) / max(1, num_actors))
    limit = max(min(share, max_tokens), min(MIN_PART_TOKENS, max_tokens))
    parts: list[list[int]] = []
    tokens = 0
    for group in groups:
        for piece in _pieces(group, max_tokens):
            if not parts or tokens + piece.num_tokens > limit:
                parts.append([])
                tokens = 0
            parts[-1] += piece.members
            tokens += piece.num_tokens
    return parts


def _groups(sequences: Sequence[Sequence[int]], prompts: Sequence[Hashable]) -> Iterator[_Group]:
    members: list[int] = []
    for place in together(len(sequences), prompts.__getitem__):
        if members and prompts[members[0]] != prompts[place]:
            yield _group(sequences, members)
            members = []
        members.append(place)
    if members:
        yield _group(sequences, members)


def _group(sequences: Sequence[Sequence[int]], members: list[int]) -> _Group:
    first = np.asarray(sequences[members[0]])
    num_shared = len(first) - 1 if len(members) > 1 else 0
    for member in members[1:]:
        other = np.asarray(sequences[member])
        shortest = min(num_shared, len(other) - 1)
        differs = np.flatnonzero(first[:shortest] != other[:shortest])
        num_shared = int(differs[0]) if len(differs) else shortest
    num_shared = num_shared if num_shared >= MIN_SHARED_TOKENS else 0
    return _Group(members, num_shared, [len(sequences[member]) - num_shared for member in members])


def _pieces(group: _Group, max_tokens: int) -> Iterator[_Group]:
    """The group itself, or pieces of at most `max_tokens` that repeat its shared tokens."""
    members: list[int] = []
    own: list[int] = []
    for member, length in zip(group.members, group.own, strict=True):
        if members and group.num_shared + sum(own) + length > max_tokens:
            yield _Group(members, group.num_shared, own)
            members, own = [], []
        members.append(member)
        own.append(length)
    yield _Group(members, group.num_shared, own)
