"""Causal attention over a packed batch, with the same bits for a sequence whatever stands beside it.

`BlockAttention` runs anywhere PyTorch does. A fused attention call picks its inner blocks from the lengths it is
given, so only calls of one shape agree to the bit. Queries are therefore cut into blocks of 32 or 64 rows at absolute
positions, each over the keys from 0 to the end of its block: the shape of every call depends on the position alone,
not on the length of the sequence. Rows past a sequence's end belong to its neighbour; the causal mask hides
their keys, and their results are dropped.

Gemma 2 caps its attention's logits, which no fused call of PyTorch does, and every other of its layers sees a window.
`BlockAttention` then multiplies, caps and takes the softmax in float32 itself, in the same canonical blocks, over the
keys that a block's first row can see. `varlen_attn` has windows and no cap, so capped models run in blocks on CUDA too.

`VarlenAttention` is FlashAttention over sequences of different lengths on CUDA, in float16 and bfloat16. With
`num_splits=1` PyTorch guarantees the same bits for a sequence whatever else is in the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from serve_app.reward_model.architecture import Window
from serve_app.reward_model.packing import PackedBatch, Read, Span, on_device

BLOCK_ROWS = 64
# Short blocks waste less on rows past a sequence's end, long ones read many keys a little faster (measured).
SHORT_BLOCK_ROWS = 32
FIRST_LONG_BLOCK = 1024
# A lone query is attended for as this many copies of it: below 4 rows the bits depend on the number of threads.
LAST_ROWS = 16


class Attention(Protocol):
    """Causal attention within each sequence of a packed batch: a span's rows see the path before them and themselves.

    Shape legend: T rows, Q query heads, K key/value heads, D head dimension, N reads.
    """

    slack_rows: int
    """Finite rows that queries, keys and values must have after the last token."""
    gathers_keys: bool
    """Whether keys and values of every sequence are copied where sequences share, all of them at once."""

    def begin(self, batch: PackedBatch) -> None:
        """Prepare for the layers of one forward pass over `batch`."""
        ...

    def attend(self, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, window: Window = None) -> Tensor:
        """The attention output of every row, finite in the padding: [T, Q, D], until the next call."""
        ...

    def attend_last(self, q_NQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, window: Window = None) -> Tensor:
        """The attention output of the batch's reads, in their order, zeros in the padding: [N, Q, D]."""
        ...

    def release_buffers(self) -> None:
        """Forget what is kept between calls: memory, and numbers that are not finite."""
        ...


class BlockAttention:
    """`scaled_dot_product_attention` in canonical blocks, one call a block; with a `softcap`, what it would do itself.

    The keys of a spine are read where they are. A scratch buffer holds the keys of the path, in which each branch
    overwrites those from its first position on; its first block carries rows before the branch as dummies, so that its
    calls are those of the sequence laid out whole.
    """

    slack_rows = BLOCK_ROWS - 1
    gathers_keys = False

    def __init__(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        hidden = torch.full((BLOCK_ROWS, BLOCK_ROWS), float("-inf"), dtype=dtype, device=device).triu(1)
        self._mask = hidden
        self._triangle = hidden
        self._spans: list[Span] = []
        self._cached: dict[int, Span] = {}
        self._num_kept: list[int] = []
        self._reads: dict[int, list[tuple[int, Read]]] = {}
        self._scratch = torch.empty(0, dtype=dtype, device=device)
        self._out = torch.empty(0, dtype=dtype, device=device)
        self.kernel = (
            partial(_attention, scale=scale)
            if softcap is None
            else partial(_capped_attention, scale=scale, softcap=softcap)
        )

    def begin(self, batch: PackedBatch) -> None:
        self._spans = batch.spans
        self._cached = {number: rows.span for number, rows in batch.cached.items()}
        self._num_kept = [batch.num_kept(number) for number in range(len(batch.spans))]
        self._reads = {}
        for index, read in enumerate(batch.reads):
            self._reads.setdefault(read.span, []).append((index, read))

    def attend(self, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, window: Window = None) -> Tensor:
        out_TQD = self._out_for(q_TQD)
        for span, k_SKD, v_SKD in self._with_keys(k_TKD, v_TKD):
            for block, end in _blocks(span):
                # Before span.start where the block begins with dummies, which may not be there behind a cached prefix.
                row = span.start + block - span.position
                end_row = row + end - block
                seen = _first_seen(block, window)
                mask = self._mask_of(end)[block - end :, seen:]
                if window is not None and end > window:
                    mask = mask + _before_window(block, end, seen, window).to(mask)
                q_BQD = q_TQD[row:end_row] if row >= 0 else F.pad(q_TQD[:end_row], (0, 0, 0, 0, -row, 0))
                result_QBD = self.kernel(q_BQD, k_SKD[seen:end], v_SKD[seen:end], mask=mask)
                first, stop = max(row, span.start), min(end_row, span.stop)
                out_TQD[first:stop] = result_QBD.transpose(0, 1)[first - row : stop - row]
        return out_TQD

    def attend_last(self, q_NQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, window: Window = None) -> Tensor:
        out_NQD = torch.zeros_like(q_NQD)
        for number, (_, k_SKD, v_SKD) in enumerate(self._with_keys(k_TKD, v_TKD)):
            for index, read in self._reads.get(number, ()):
                q_RQD = q_NQD[index].expand(LAST_ROWS, -1, -1)
                keys = slice(_first_seen(read.num_keys - 1, window), read.num_keys)
                result_QRD = self.kernel(q_RQD, k_SKD[keys], v_SKD[keys], mask=None)
                out_NQD[index] = result_QRD[:, 0]
        return out_NQD

    def release_buffers(self) -> None:
        self._scratch = self._scratch.new_empty(0)
        self._out = self._out.new_empty(0)

    def _out_for(self, q_TQD: Tensor) -> Tensor:
        """A buffer for the result, without the slack; the rows past the tokens are zeros."""
        num_rows, num_heads, head_dim = q_TQD.shape
        size = (num_rows - self.slack_rows) * num_heads * head_dim
        if self._out.numel() < size:
            self._out = torch.empty(size, dtype=q_TQD.dtype, device=q_TQD.device)
        out_TQD = self._out[:size].view(-1, num_heads, head_dim)
        out_TQD[self._spans[-1].stop :] = 0
        return out_TQD

    def _with_keys(self, k_TKD: Tensor, v_TKD: Tensor) -> Iterator[tuple[Span, Tensor, Tensor]]:
        """Each span with its keys and values from position 0 on, and finite rows behind them."""
        scratch_k, scratch_v = self._scratch_for(k_TKD)
        for number, (span, following) in enumerate(zip(self._spans, [*self._num_kept[1:], 0], strict=True)):
            if span.position:
                cached = self._cached.get(number)
                for part in (span,) if cached is None else (cached, span):
                    scratch_k[part.position : part.num_keys] = k_TKD[part.start : part.stop]
                    scratch_v[part.position : part.num_keys] = v_TKD[part.start : part.stop]
                yield span, scratch_k, scratch_v
                continue
            yield span, k_TKD[span.start :], v_TKD[span.start :]
            if following:  # the deepest of the spine's branches comes first
                scratch_k[:following] = k_TKD[span.start :][:following]
                scratch_v[:following] = v_TKD[span.start :][:following]

    def _scratch_for(self, k_TKD: Tensor) -> tuple[Tensor, Tensor]:
        longest = max((span.num_keys for span in self._spans if span.position), default=0)
        num_heads, head_dim = k_TKD.shape[1:]
        size = 2 * (longest + self.slack_rows) * num_heads * head_dim
        if longest and self._scratch.numel() < size:
            self._scratch = torch.zeros(size, dtype=k_TKD.dtype, device=k_TKD.device)
        k, v = self._scratch[: size if longest else 0].chunk(2) if longest else (self._scratch, self._scratch)
        return k.view(-1, num_heads, head_dim), v.view(-1, num_heads, head_dim)

    def _mask_of(self, num_keys: int) -> Tensor:
        """0 where a key may be seen and -inf where not, for the last 64 of `num_keys` positions: [64, num_keys]."""
        columns = self._mask.shape[1]
        if columns < num_keys:
            columns = max(num_keys, 2 * columns)
            self._mask = torch.cat([self._triangle.new_zeros(BLOCK_ROWS, columns - BLOCK_ROWS), self._triangle], dim=1)
        return self._mask[:, columns - num_keys :]


def _blocks(span: Span) -> Iterator[tuple[int, int]]:
    """First position and end of each canonical block that the span's rows are in."""
    block = span.position - span.position % _block_rows(span.position)
    while block < span.num_keys:
        end = block + _block_rows(block)
        yield block, end
        block = end


def _block_rows(position: int) -> int:
    return SHORT_BLOCK_ROWS if position < FIRST_LONG_BLOCK else BLOCK_ROWS


def _first_seen(position: int, window: Window) -> int:
    """The first position that a row at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def _before_window(block: int, end: int, seen: int, window: int) -> Tensor:
    """-inf where a key lies before a row's window and 0 elsewhere, for a block's rows: float32 [rows, end - seen]."""
    rows, keys = torch.arange(block, end)[:, None], torch.arange(seen, end)[None]
    return torch.zeros(end - block, end - seen).masked_fill_(keys <= rows - window, float("-inf"))


def _attention(
    q_RQD: Tensor, k_SKD: Tensor, v_SKD: Tensor, *, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Attention of R query rows over S keys: [Q, R, D]."""
    q_1QRD, k_1KSD, v_1KSD = (rows.transpose(0, 1)[None] for rows in (q_RQD, k_SKD, v_SKD))
    return F.scaled_dot_product_attention(q_1QRD, k_1KSD, v_1KSD, attn_mask=mask, scale=scale, enable_gqa=True)[0]


def _capped_attention(
    q_RQD: Tensor, k_SKD: Tensor, v_SKD: Tensor, *, mask: Tensor | None, scale: float | None, softcap: float
) -> Tensor:
    """Attention whose logits are `softcap * tanh(q @ k * scale / softcap)`: [Q, R, D], in float32 until the end."""
    num_rows, num_heads, head_dim = q_RQD.shape
    num_kv_heads = k_SKD.shape[1]
    factor = (head_dim**-0.5 if scale is None else scale) / softcap
    q_KAD = q_RQD.float().transpose(0, 1).reshape(num_kv_heads, -1, head_dim)  # A: the rows of a key head's queries
    k_KDS, v_KSD = k_SKD.float().permute(1, 2, 0), v_SKD.float().transpose(0, 1)
    logits_KAS = torch.bmm(q_KAD, k_KDS).mul_(factor).tanh_().mul_(softcap)
    if mask is not None:
        logits_KAS.view(num_kv_heads, -1, num_rows, len(k_SKD)).add_(mask)
    result_KAD = torch.bmm(torch.softmax(logits_KAS, dim=-1), v_KSD)
    return result_KAD.view(num_heads, num_rows, head_dim).to(q_RQD.dtype)


class VarlenAttention:
    """FlashAttention over a packed batch on CUDA, in one call. Keys are copied first where sequences share."""

    slack_rows = 0
    gathers_keys = True

    def __init__(self, device: torch.device, *, invariant: bool = True) -> None:
        from torch.nn.attention.varlen import varlen_attn

        # Not every version of PyTorch has both; where one is missing, what it asks for is how the call works anyway.
        wanted = {"enable_gqa": True} | ({"num_splits": 1} if invariant else {})
        known = inspect.signature(varlen_attn).parameters
        options = {name: value for name, value in wanted.items() if name in known}
        self._call = partial(cast(Callable[..., Tensor], varlen_attn), **options)
        self._device = device

    def begin(self, batch: PackedBatch) -> None:
        device = self._device
        spans, reads = batch.spans, batch.reads
        self._num_rows, self._num_tokens = len(batch.token_ids_T), batch.num_tokens
        # Rows of padding are a sequence of their own, so that the call's result is the whole of what is wanted.
        padding = range(self._num_tokens, self._num_rows)
        lengths = [len(padding)] if padding else []
        self._all = _Lengths.of(
            [span.num_rows for span in spans] + lengths, [span.num_keys for span in spans] + lengths, device
        )
        self._last = _Lengths.of([1] * len(reads), [read.num_keys for read in reads], device)
        self._keys_of_all: Tensor | None = None
        self._keys_of_last: Tensor | None = None
        if batch.shares or len(reads) > len(spans):
            paths = batch.paths()
            self._keys_of_last = _joined([paths[read.span][: read.num_keys] for read in reads], device)
            self._keys_of_all = _joined([*paths, np.asarray(padding)], device) if batch.shares else None

    def attend(self, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, window: Window = None) -> Tensor:
        k, v = (_selected(rows, self._keys_of_all, self._num_rows) for rows in (k_TKD, v_TKD))
        return self._varlen(q_TQD, k, v, *self._all.arguments, window=window)

    def attend_last(self, q_NQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, window: Window = None) -> Tensor:
        count = len(self._last.cu_seq_q) - 1
        k, v = (_selected(rows, self._keys_of_last, self._num_tokens) for rows in (k_TKD, v_TKD))
        out_NQD = torch.zeros_like(q_NQD)
        out_NQD[:count] = self._varlen(q_NQD[:count], k, v, *self._last.arguments, window=window)
        return out_NQD

    def release_buffers(self) -> None:
        """Nothing is kept."""

    def _varlen(self, *arguments: Tensor | int, window: Window) -> Tensor:
        # Causal is aligned to the last key, so a lone last query sees every key of its sequence.
        return self._call(*arguments, window_size=(-1 if window is None else window - 1, 0))


def _selected(rows_TKD: Tensor, numbers: Tensor | None, count: int) -> Tensor:
    """The rows of those numbers, or the first `count`."""
    return rows_TKD[:count] if numbers is None else rows_TKD[numbers]


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Where queries and keys of each sequence begin, as `varlen_attn` wants it."""

    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, num_queries: list[int], num_keys: list[int], device: torch.device) -> _Lengths:
        return cls(_cumulative(num_queries, device), _cumulative(num_keys, device), max(num_queries), max(num_keys))

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        return self.cu_seq_q, self.cu_seq_k, self.max_q, self.max_k


def _joined(rows: Sequence[NDArray[np.int64]], device: torch.device) -> Tensor:
    """Numbers of rows, end to end: int64 on the device."""
    return on_device(torch.from_numpy(np.concatenate(rows)), device)


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    """0 and the running sums of `lengths`: int32 [len(lengths) + 1] on the device."""
    return on_device(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), device)


def attention_for(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    invariant: bool = True,
) -> Attention:
    """FlashAttention where it runs: in half precision on Ampere GPUs or newer, for logits that are neither scaled nor
    capped in a way of their own; canonical blocks elsewhere.
    """
    half = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256
    plain = scale is None and softcap is None
    if plain and device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0):
        return VarlenAttention(device, invariant=invariant)
    return BlockAttention(device=device, dtype=dtype, scale=scale, softcap=softcap)
