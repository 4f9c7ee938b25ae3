"""A list of token-id sequences cut into parts for several processes; those that begin alike stay together."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from serve_app.reward_model.conversation import Conversation
from serve_app.reward_model.errors import ScoringError
from serve_app.reward_model.prefixes import Branch, branch_by_prefix, in_tree_order

MIN_PART_TOKENS = 512
"""Below so many tokens a part costs more in messages than another process saves by computing it."""
MAX_REPEATS = 16
"""Tokens of a part with every sequence counted whole, over its bound, at most: shared tokens are computed once, and
still wait in queues as often as there are sequences."""


def conversation_order(parsed: Sequence[Conversation | ScoringError]) -> list[int]:
    """The places of conversations, those that begin with the same messages beside each other."""
    paths: list[Sequence[Hashable]] = [item.prompt if isinstance(item, Conversation) else () for item in parsed]
    return in_tree_order(paths)


def cut(sequences: Sequence[Sequence[int]], *, max_tokens: int, num_processes: int = 1) -> list[list[int]]:
    """The places of each part's sequences.

    Tokens that sequences begin with are counted once, as the model reads them, at any depth: candidates of one prompt,
    turns of a conversation, branches of a tree. A part has about a process's share of the list, at most `max_tokens`; a
    run of sequences that share and exceed that is cut into several parts, which repeat what they share, and a sequence
    that exceeds it is a part of its own.

    Args:
        sequences: token ids.
        max_tokens: the most tokens of a part; with every sequence counted whole, `MAX_REPEATS` times as many.
        num_processes: how many processes share the list; 1 fills every part.
    """
    lengths = [len(sequence) for sequence in sequences]
    pieces = [piece for run in _runs(branch_by_prefix(sequences)) for piece in _pieces(run, lengths, max_tokens)]
    share = math.ceil(sum(_num_read(piece, lengths) for piece in pieces) / max(1, num_processes))
    limit = max(min(share, max_tokens), min(MIN_PART_TOKENS, max_tokens))
    parts: list[list[int]] = []
    tokens = whole_tokens = 0
    for piece in pieces:
        own = _num_read(piece, lengths)
        whole = sum(lengths[branch.sequence] for branch in piece)
        tokens, whole_tokens = tokens + own, whole_tokens + whole
        if not parts or tokens > limit or whole_tokens > MAX_REPEATS * max_tokens:
            parts.append([])
            tokens, whole_tokens = own, whole
        parts[-1] += [branch.sequence for branch in piece]
    return parts


def _runs(branches: Sequence[Branch]) -> list[list[Branch]]:
    """Branches in runs: the first of each is read whole."""
    runs: list[list[Branch]] = []
    for branch in branches:
        if not branch.num_shared:
            runs.append([])
        runs[-1].append(branch)
    return runs


def _pieces(run: Sequence[Branch], lengths: Sequence[int], max_tokens: int) -> list[list[Branch]]:
    """The run itself, or pieces of it within the bounds, whose first branches are read whole."""
    pieces: list[list[Branch]] = []
    tokens = whole_tokens = 0
    for branch in run:
        length = lengths[branch.sequence]
        tokens += branch.num_own(lengths)
        whole_tokens += length
        if not pieces or tokens > max_tokens or whole_tokens > MAX_REPEATS * max_tokens:
            pieces.append([])
            branch = Branch(branch.sequence)
            tokens = whole_tokens = length
        pieces[-1].append(branch)
    return pieces


def _num_read(piece: Sequence[Branch], lengths: Sequence[int]) -> int:
    return sum(branch.num_own(lengths) for branch in piece)
