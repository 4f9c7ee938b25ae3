"""The rules that give a row of a matrix product, and of SiLU, the same bits in any batch; and a probe of them.

Matrix libraries choose kernels by row count. On CPU a row has the same bits for any count from 16 up (measured:
fp32 differs below 4, bf16 below 2); on CUDA the kernel, and with it the bits, may change at any count, so products
run in tiles of one fixed size. Batches are padded to these row counts, never split below them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowRule", "find_variant_shape", "silu_multiply"]

CPU_MIN_ROWS = 16
CUDA_TILE_ROWS = 1024
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
        # A multiple of the thread count too, so that `silu_multiply` can give every thread whole rows.
        return cls(multiple=math.lcm(CPU_MIN_ROWS, torch.get_num_threads()))

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
    """`silu(gate) * up` into `out`; `gate_up` holds the two side by side. T is a multiple of the thread count.

    PyTorch computes the last few elements of each thread's share with scalar code, whose exponential may differ from
    the vector code's in the last bit. So the shares must be whole rows: small inputs run in pieces that one thread
    takes whole, large ones are split at a row because T is a multiple of the thread count.
    """
    num_rows, width = out_TF.shape
    threads = torch.get_num_threads() if out_TF.device.type == "cpu" else 1
    shared = num_rows * width > (threads - 1) * SERIAL_ELEMENTS
    step = num_rows if shared else SERIAL_ELEMENTS // width
    for first in range(0, num_rows, step):
        rows = slice(first, first + step)
        torch.ops.aten.silu.out(gate_up_TG[rows, :width], out=out_TF[rows])
    return out_TF.mul_(gate_up_TG[:, width:])


@torch.inference_mode()
def find_variant_shape(rule: RowRule, weights: list[Tensor]) -> tuple[int, ...] | None:
    """The first weight shape whose product's bits change with the number of rows on this machine, or None."""
    generator = torch.Generator().manual_seed(0)
    for weight in {tuple(weight.shape): weight for weight in weights}.values():
        most = rule.multiple * 4
        x = torch.randn(most, weight.shape[1], generator=generator).to(weight)
        whole = rule.matmul(x, weight, None, x.new_empty(most, weight.shape[0]))
        for rows in (rule.multiple, rule.multiple * 3):
            part = rule.matmul(x[-rows:], weight, None, x.new_empty(rows, weight.shape[0]))
            if not torch.equal(part, whole[-rows:]):
                return tuple(weight.shape)
    return None
