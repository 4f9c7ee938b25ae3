"""A trainer's padded or packed token ids -> one list of ids a sequence. Next stop: `policy_text.py`.

Padding is told by the attention mask alone: a padding id that is also the policy's EOS, or any other, means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.reward_pool.errors import RewardInputError

__all__ = ["unpadded"]


def unpadded(
    sequences: Tensor,
    attention_mask: Tensor | None = None,
    packed_seq_lens: Sequence[int] | Tensor | None = None,
    *,
    pad_sequence: bool = False,
) -> list[list[int]]:
    """The token ids of each sequence without its padding, in order. Shape legend: B sequences, T tokens.

    Args:
        sequences: integers [B, T]; packed ones end to end, [T] or [1, T].
        attention_mask: of the same shape, nonzero where a token counts: one run in each row, padding on either side.
            Without it every token counts.
        packed_seq_lens: the lengths of packed sequences.
        pad_sequence: whether a packed row has padding after the last sequence, as for ring attention.

    Raises:
        RewardInputError: a shape or dtype is wrong, the lengths do not add up, or a row's mask has a hole. The message
            names the row.
    """
    ids = _integers(sequences, "sequences")
    mask = (
        np.ones(ids.shape, dtype=bool) if attention_mask is None else _integers(attention_mask, "attention_mask") != 0
    )
    if mask.shape != ids.shape:
        raise RewardInputError(
            f"attention_mask is {list(mask.shape)} and sequences are {list(ids.shape)}; they go together"
        )
    if packed_seq_lens is not None:
        return _unpacked(ids, mask, [int(length) for length in packed_seq_lens], pad_sequence)
    if ids.ndim != 2:
        raise RewardInputError(f"sequences are [B, T], not {list(ids.shape)}; packed ones need packed_seq_lens")
    return [_kept(row, kept, place) for place, (row, kept) in enumerate(zip(ids, mask, strict=True))]


def _unpacked(ids: NDArray[Any], mask: NDArray[Any], lengths: list[int], pad_sequence: bool) -> list[list[int]]:
    if ids.ndim == 2 and len(ids) == 1:
        ids, mask = ids[0], mask[0]
    if ids.ndim != 1:
        raise RewardInputError(f"packed sequences are [T] or [1, T], not {list(ids.shape)}")
    total = sum(lengths)
    if min(lengths, default=1) < 1 or total > len(ids) or (total < len(ids) and not pad_sequence):
        raise RewardInputError(
            f"packed_seq_lens are positive and add up to {total}; there are {len(ids)} tokens"
            + ("" if pad_sequence else " (pad_sequence=True allows for padding after the last)")
        )
    starts = [0, *np.cumsum(lengths).tolist()]
    return [_kept(ids[start:stop], mask[start:stop], place) for place, (start, stop) in enumerate(pairwise(starts))]


def _kept(ids: NDArray[Any], mask: NDArray[Any], place: int) -> list[int]:
    places = np.flatnonzero(mask)
    if len(places) and places[-1] - places[0] + 1 != len(places):
        raise RewardInputError(
            f"row {place} of attention_mask has a hole: the tokens of a sequence are one run, with padding around it"
        )
    kept: list[int] = ids[places].tolist()
    return kept


def _integers(tensor: Tensor, name: str) -> NDArray[Any]:
    if not isinstance(tensor, Tensor):
        raise RewardInputError(f"{name} is a tensor, not {type(tensor).__name__}")
    if tensor.is_floating_point() or tensor.is_complex():
        raise RewardInputError(f"{name} holds integers, not {str(tensor.dtype).removeprefix('torch.')}")
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array
