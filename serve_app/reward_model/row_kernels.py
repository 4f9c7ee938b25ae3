"""Triton kernels of what a decoder does row by row on CUDA: residual and norm, rotation, gate times up.

Plain operations launch some 40 kernels a layer for these, and read and write each number several times. Here a row is
one program, so that its bits cannot depend on the rows beside it. Results are rounded where the plain operations round
theirs. Triton comes with CUDA builds of PyTorch; where it is missing, `decoder.py` does without.

Shape legend: T rows, H hidden, A heads, D head dimension, I intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def add_norm_kernel(hidden, added, weight, out, eps, width: tl.constexpr, adds: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row: `hidden` plus `added` in place, then its RMSNorm into `out`."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, block)
    inside = lanes < width
    x = tl.load(hidden + row * width + lanes, mask=inside, other=0.0)
    if adds:
        x += tl.load(added + row * width + lanes, mask=inside, other=0.0).to(tl.float32)
        tl.store(hidden + row * width + lanes, x, mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    normed = x * scale * tl.load(weight + lanes, mask=inside, other=0.0)
    tl.store(out + row * width + lanes, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def rotate_kernel(  # type: ignore[no-untyped-def]
    heads,
    stride,
    table,
    out,
    num_heads: tl.constexpr,
    half: tl.constexpr,
    head_block: tl.constexpr,
    half_block: tl.constexpr,
):
    """One row: all its heads, the first half of each paired with the second."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, head_block)[:, None]
    lane = tl.arange(0, half_block)[None, :]
    inside = (head < num_heads) & (lane < half)
    angles = table + row * 2 * half + lane
    cos = tl.load(angles, mask=lane < half, other=0.0)
    sin = tl.load(angles + half, mask=lane < half, other=0.0)
    place = head * 2 * half + lane
    first = tl.load(heads + row * stride + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads + row * stride + place + half, mask=inside, other=0.0).to(tl.float32)
    to = out + row * num_heads * 2 * half + place
    tl.store(to, (first * cos - second * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, (second * cos + first * sin).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def silu_times_kernel(gate, up, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """A stretch of `up`, times SiLU of `gate`, which is rounded in between."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0)
    activated = (g / (1.0 + tl.exp(-g))).to(u.dtype)
    tl.store(up + place, (activated.to(tl.float32) * u.to(tl.float32)).to(u.dtype), mask=inside)


SILU_BLOCK = 1024
UNFUSED = {"enable_fp_fusion": False}
"""Products and sums are rounded one by one, as PyTorch's operations round them."""


def add_norm(hidden_TH: Tensor, added_TH: Tensor | None, weight_H: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Add to the float32 residual stream, in place, where there is something to add; its RMSNorm, [T, H] in `dtype`."""
    num_rows, width = hidden_TH.shape
    out_TH = torch.empty(num_rows, width, dtype=dtype, device=hidden_TH.device)
    block = triton.next_power_of_2(width)
    add_norm_kernel[(num_rows,)](
        hidden_TH,
        hidden_TH if added_TH is None else added_TH,
        weight_H,
        out_TH,
        eps,
        width=width,
        adds=added_TH is not None,
        block=block,
        num_warps=_num_warps(block),
        **UNFUSED,
    )
    return out_TH


def rotate(heads_TAD: Tensor, table_TD: Tensor, out_TAD: Tensor) -> None:
    """Write the rotated heads of each row to `out`, which is contiguous; see `rotary.rotate`."""
    num_rows, num_heads, head_dim = heads_TAD.shape
    if not out_TAD.is_contiguous() or heads_TAD.stride()[1:] != (head_dim, 1) or not table_TD.is_contiguous():
        raise ValueError("rows to rotate are contiguous within each row, and what they are written to altogether")
    rotate_kernel[(num_rows,)](
        heads_TAD,
        heads_TAD.stride(0),
        table_TD,
        out_TAD,
        num_heads=num_heads,
        half=head_dim // 2,
        head_block=triton.next_power_of_2(num_heads),
        half_block=triton.next_power_of_2(head_dim // 2),
        **UNFUSED,
    )


def silu_times(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """SiLU of `gate` times `up`, in place of `up`: [T, I]; both are contiguous."""
    count = up_TI.numel()
    silu_times_kernel[(triton.cdiv(count, SILU_BLOCK),)](gate_TI, up_TI, count, block=SILU_BLOCK, **UNFUSED)
    return up_TI


def _num_warps(block: int) -> int:
    """Warps of 32 threads, each of which then holds at most 16 numbers of a row."""
    return min(16, max(4, block // 512))
