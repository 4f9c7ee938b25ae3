"""Causal attention over a packed batch, with the same bits for a sequence whatever stands beside it.

`BlockAttention` runs anywhere PyTorch does. A fused attention call picks its inner blocks from the lengths it is
given, so only calls of one shape agree to the bit. Queries are therefore cut into blocks of 64 rows at absolute
multiples of 64, each over the keys from 0 to the end of its block: the shape of every call depends on the position
alone, not on the length of the sequence. Rows past a sequence's end belong to its neighbour; the causal mask hides
their keys, and their results are dropped.

`VarlenAttention` is FlashAttention over sequences of different lengths on CUDA, in float16 and bfloat16. With
`num_splits=1` PyTorch guarantees the same bits for a sequence whatever else is in the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.reward_model.packing import PackedBatch

__all__ = ["BLOCK_ROWS", "Attention", "BlockAttention", "VarlenAttention", "attention_for"]

BLOCK_ROWS = 64
# A lone query is attended for as this many copies of it: below 4 rows the bits depend on the number of threads.
LAST_ROWS = 16


class Attention(Protocol):
    """Causal attention within each sequence of a packed batch.

    Shape legend: T rows, Q query heads, K key/value heads, D head dimension, N sequences.
    """

    slack_rows: int
    """Finite rows that queries, keys and values must have after the last token."""

    def attend(self, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, batch: PackedBatch, out_TQD: Tensor) -> None:
        """Write the attention output of every token to `out_TQD`."""
        ...

    def attend_last(self, q_NQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, batch: PackedBatch, out_NQD: Tensor) -> None:
        """Write the attention output of each sequence's last token to `out_NQD`."""
        ...


class BlockAttention:
    """`scaled_dot_product_attention` in canonical blocks, one call a block."""

    slack_rows = BLOCK_ROWS - 1

    def __init__(self, *, device: torch.device, dtype: torch.dtype) -> None:
        hidden = torch.full((BLOCK_ROWS, BLOCK_ROWS), float("-inf"), dtype=dtype, device=device).triu(1)
        self._mask = hidden
        self._triangle = hidden

    def _block_mask(self, num_keys: int) -> Tensor:
        """0 where a key may be seen and -inf where not: a view of [64, num_keys], its last 64 columns a triangle."""
        columns = self._mask.shape[1]
        if columns < num_keys:
            columns = max(num_keys, 2 * columns)
            self._mask = torch.cat([self._triangle.new_zeros(BLOCK_ROWS, columns - BLOCK_ROWS), self._triangle], dim=1)
        return self._mask[:, columns - num_keys :]

    def attend(self, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, batch: PackedBatch, out_TQD: Tensor) -> None:
        for start, length in zip(batch.starts, batch.lengths, strict=True):
            for block in range(0, length, BLOCK_ROWS):
                rows = slice(start + block, start + block + BLOCK_ROWS)
                keys = slice(start, start + block + BLOCK_ROWS)
                result_QBD = _attention(
                    q_TQD[rows], k_TKD[keys], v_TKD[keys], mask=self._block_mask(block + BLOCK_ROWS)
                )
                valid = min(BLOCK_ROWS, length - block)
                out_TQD[start + block : start + block + valid] = result_QBD.transpose(0, 1)[:valid]

    def attend_last(self, q_NQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, batch: PackedBatch, out_NQD: Tensor) -> None:
        for index, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
            keys = slice(start, start + length)
            q_RQD = q_NQD[index].expand(LAST_ROWS, -1, -1)
            out_NQD[index] = _attention(q_RQD, k_TKD[keys], v_TKD[keys], mask=None)[:, 0]


def _attention(q_RQD: Tensor, k_SKD: Tensor, v_SKD: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of R query rows over S keys: [Q, R, D]."""
    q_1QRD, k_1KSD, v_1KSD = (rows.transpose(0, 1)[None] for rows in (q_RQD, k_SKD, v_SKD))
    return F.scaled_dot_product_attention(q_1QRD, k_1KSD, v_1KSD, attn_mask=mask, enable_gqa=True)[0]


class VarlenAttention:
    """FlashAttention over a packed batch on CUDA: one call for all sequences."""

    slack_rows = 0

    def __init__(self) -> None:
        from torch.nn.attention.varlen import varlen_attn

        # Not every version of PyTorch has both; where one is missing, what it asks for is how the call works anyway.
        wanted = {"enable_gqa": True, "num_splits": 1}
        known = inspect.signature(varlen_attn).parameters
        options = {name: value for name, value in wanted.items() if name in known}
        # Causal is aligned to the last key, so a lone last query sees every key of its sequence.
        call = cast(Callable[..., Tensor], varlen_attn)
        self._varlen = partial(call, window_size=(-1, 0), **options)

    def attend(self, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, batch: PackedBatch, out_TQD: Tensor) -> None:
        tokens = batch.num_tokens
        cu_seq = _cumulative(batch.lengths, q_TQD.device)
        longest = max(batch.lengths)
        out_TQD[:tokens] = self._varlen(
            q_TQD[:tokens], k_TKD[:tokens], v_TKD[:tokens], cu_seq, cu_seq, longest, longest
        )

    def attend_last(self, q_NQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, batch: PackedBatch, out_NQD: Tensor) -> None:
        count, tokens = len(batch.lengths), batch.num_tokens
        cu_q, cu_k = _cumulative([1] * count, q_NQD.device), _cumulative(batch.lengths, q_NQD.device)
        out_NQD[:count] = self._varlen(q_NQD[:count], k_TKD[:tokens], v_TKD[:tokens], cu_q, cu_k, 1, max(batch.lengths))


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    """0 and the running sums of `lengths`: int32 [len(lengths) + 1] on the device."""
    host = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return host.pin_memory().to(device, non_blocking=True)


def attention_for(device: torch.device, dtype: torch.dtype) -> Attention:
    """FlashAttention where it exists, canonical blocks elsewhere (float32 on CUDA included)."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return VarlenAttention()
    return BlockAttention(device=device, dtype=dtype)
