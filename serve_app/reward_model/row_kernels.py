"""Triton kernels of what a decoder does row by row on CUDA: residual and norm, rotation, gate times up, 8-bit floats.

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
    out_stride,
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
    to = out + row * out_stride + place
    tl.store(to, (first * cos - second * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, (second * cos + first * sin).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def silu_times_kernel(gate_up, out, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """A stretch of a row: its right half times SiLU of the left one, which is rounded in between."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < width
    g = tl.load(gate_up + row * 2 * width + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + row * 2 * width + width + place, mask=inside, other=0.0)
    activated = (g / (1.0 + tl.exp(-g))).to(u.dtype)
    tl.store(out + row * width + place, (activated.to(tl.float32) * u.to(tl.float32)).to(u.dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_kernel(x, out, scales, width: tl.constexpr, largest: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row as 8-bit floats, the largest magnitude brought to `largest`, and what it was divided by."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, block)
    inside = lanes < width
    values = tl.load(x + row * width + lanes, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12), largest)
    tl.store(scales + row, scale)
    tl.store(out + row * width + lanes, tl.div_rn(values, scale).to(out.dtype.element_ty), mask=inside)


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
    """Write the rotated heads of each row to `out`, which may be `heads`; see `rotary.rotate`."""
    num_rows, num_heads, head_dim = heads_TAD.shape
    within = (head_dim, 1)
    if not heads_TAD.stride()[1:] == out_TAD.stride()[1:] == within or not table_TD.is_contiguous():
        raise ValueError("rows to rotate, and those they are written to, are contiguous within each row")
    rotate_kernel[(num_rows,)](
        heads_TAD,
        heads_TAD.stride(0),
        table_TD,
        out_TAD,
        out_TAD.stride(0),
        num_heads=num_heads,
        half=head_dim // 2,
        head_block=triton.next_power_of_2(num_heads),
        half_block=triton.next_power_of_2(head_dim // 2),
        **UNFUSED,
    )


def silu_times(gate_up_TJ: Tensor) -> Tensor:
    """SiLU of the left half of each row times the right half: [T, I] of [T, 2 * I]."""
    num_rows, both = gate_up_TJ.shape
    out_TI = gate_up_TJ.new_empty(num_rows, both // 2)
    grid = (num_rows, triton.cdiv(both // 2, SILU_BLOCK))
    silu_times_kernel[grid](gate_up_TJ, out_TI, both // 2, block=SILU_BLOCK, **UNFUSED)
    return out_TI


def quantized_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """`linear.quantized_rows` in one pass: 8-bit floats [T, I], and the scale [T, 1] that each row was divided by."""
    num_rows, width = x_TI.shape
    out_TI = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x_TI.device)
    scale_T1 = torch.empty(num_rows, 1, dtype=torch.float32, device=x_TI.device)
    block = triton.next_power_of_2(width)
    largest = torch.finfo(torch.float8_e4m3fn).max
    quantize_kernel[(num_rows,)](
        x_TI, out_TI, scale_T1, width=width, largest=largest, block=block, num_warps=_num_warps(block), **UNFUSED
    )
    return out_TI, scale_T1


def _num_warps(block: int) -> int:
    """Warps of 32 threads, each of which then holds at most 16 numbers of a row."""
    return min(16, max(4, block // 512))
