"""The rules that give a row of a matrix product, and of SiLU, the same bits in any batch; and a probe of them.

Matrix libraries choose kernels by row count. On CPU a row has the same bits for any count from 16 up and any number of
threads, where the weight's rows are a multiple of 16 too, as in every real model (measured: fp32 differs below 4 rows,
bf16 below 2, and odd widths with 3 threads or more); on CUDA the kernel, and with it the bits, may change at any
count, so products run in tiles of one fixed size. Batches are padded to these row counts, never split below them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["RowRule", "find_variance", "silu_multiply"]

CPU_MIN_ROWS = 16
CUDA_TILE_ROWS = 1024
PROBED_THREADS = (1, 2, 4, 8, 16)
# PyTorch runs an element-wise operation of up to this many elements on one thread (ATen's GRAIN_SIZE).
SERIAL_ELEMENTS = 32768


@dataclass(frozen=True, slots=True)
class RowRule:
    """How many rows a matrix product runs on: multiples of `multiple`, in calls of `tile_rows` where that is set."""

    multiple: int
    tile_rows: int | None = None

    @classmethod
    def for_device(cls, device: torch.device) -> RowRule:
        if device.type == "cuda":
            return cls(multiple=CUDA_TILE_ROWS, tile_rows=CUDA_TILE_ROWS)
        return cls(multiple=CPU_MIN_ROWS)

    def padded(self, num_rows: int) -> int:
        return math.ceil(num_rows / self.multiple) * self.multiple

    def matmul(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_TO: Tensor) -> Tensor:
        """`x @ weight.T + bias` into `out`. Shape legend: T padded rows, I and O features."""
        step = self.tile_rows or len(x_TI)
        for first in range(0, len(x_TI), step):
            rows = slice(first, first + step)
            if bias_O is None:
                torch.mm(x_TI[rows], weight_OI.t(), out=out_TO[rows])
            else:
                torch.addmm(bias_O, x_TI[rows], weight_OI.t(), out=out_TO[rows])
        return out_TO


def silu_multiply(gate_up_TG: Tensor, out_TF: Tensor) -> Tensor:
    """`silu(gate) * up` into `out`; `gate_up` holds the two side by side.

    PyTorch computes the last few elements of each thread's share with scalar code, whose exponential may differ from
    the vector code's in the last bit. So the shares must be whole rows: as many rows as the threads divide evenly are
    shared among them, the rest run in pieces that one thread takes whole.
    """
    num_rows, width = out_TF.shape
    threads = torch.get_num_threads() if out_TF.device.type == "cpu" else 1
    even_rows = num_rows - num_rows % threads
    # With fewer elements PyTorch would use fewer threads, and cut the rows elsewhere.
    shared_rows = even_rows if even_rows * width > (threads - 1) * SERIAL_ELEMENTS else 0
    step = max(1, SERIAL_ELEMENTS // width)
    starts = [0, *range(shared_rows, num_rows, step)] if shared_rows else list(range(0, num_rows, step))
    for first, stop in zip(starts, [*starts[1:], num_rows], strict=True):
        torch.ops.aten.silu.out(gate_up_TG[first:stop, :width], out=out_TF[first:stop])
    return out_TF.mul_(gate_up_TG[:, width:])


@torch.inference_mode()
def find_variance(
    rule: RowRule, weights: Sequence[Tensor], *, num_heads: int, num_kv_heads: int, head_dim: int
) -> str | None:
    """What changes its bits on this machine with the rows beside it or the number of threads, or None.

    Tries the model's own matrix shapes and attention blocks, on CPU with several thread counts: milliseconds to a
    second.
    """
    before = torch.get_num_threads()
    try:
        for weight in {tuple(weight.shape): weight for weight in weights}.values():
            if _product_varies(rule, weight):
                return f"a matrix product of shape {tuple(weight.shape)}"
        if weights[0].device.type == "cpu" and _attention_varies(weights[0], num_heads, num_kv_heads, head_dim):
            return f"attention with {num_heads} heads of {head_dim}"
    finally:
        torch.set_num_threads(before)
    return None


def _product_varies(rule: RowRule, weight: Tensor) -> bool:
    num_rows = rule.multiple * 4
    x = torch.randn(num_rows, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    whole = rule.matmul(x, weight, None, x.new_empty(num_rows, weight.shape[0]))
    for threads in PROBED_THREADS if weight.device.type == "cpu" else (torch.get_num_threads(),):
        torch.set_num_threads(threads)
        for rows in (rule.multiple, rule.multiple * 3):
            part = rule.matmul(x[-rows:], weight, None, x.new_empty(rows, weight.shape[0]))
            if not torch.equal(part, whole[-rows:]):
                return True
    return False


def _attention_varies(like: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = (torch.randn(1, count, 192, head_dim, generator=generator).to(like) for count in heads)
    found = []
    for threads in PROBED_THREADS:
        torch.set_num_threads(threads)
        for rows in (16, 64):
            found.append((rows, F.scaled_dot_product_attention(q[:, :, :rows], k, v, enable_gqa=True)))
    first = dict(reversed(found))
    return any(not torch.equal(result, first[rows]) for rows, result in found)
