"""Matrix products by oneDNN, for CPUs.

`OneDnnLinear` lays the weight out once as the kernels want it; SiLU and multiplication happen on the float32 sums
before they are rounded. A row has the same bits for any count from 16 up and any number of threads, where the weight's
rows are a multiple of 16 too, as in every real model.

Not so with AMX in bfloat16, as on newer Intel processors: there oneDNN cuts a sum by the number of rows and of threads.
`varies` finds the products that it does so with, and `PiecewiseLinear` gives oneDNN pieces of one size, each on one
thread; threads of its own share them. The decoder gives them whole chunks of rows where there are enough.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

PROBED_THREADS, PROBED_ROWS = (1, 2, 3, 8, 16), (16, 48, 512)
"""What tells the products apart whose bits vary; `invariance` tries more once they are laid out."""
PIECE_ROWS, LONG_PIECES, PIECE_COLUMNS = 64, (256, 128), 512
"""The size of a product's pieces. In 64 rows AMX is 0.55 to 0.85 times as fast as in hundreds, in 32 half of that; so
pieces are longer where that is found to keep the bits. A lone request has few rows; its threads share the columns."""


@dataclass(frozen=True, slots=True)
class OneDnnLinear:
    """A product by oneDNN; `weight` is in its own layout, `[O, I]` still its shape."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None) -> OneDnnLinear:
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous()), bias_O)

    @staticmethod
    def supports(weight: Tensor) -> bool:
        """Whether this build of PyTorch and this processor have it for the weight's device and dtype."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if weight.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return weight.dtype == torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self.weight, self.bias, "none", [], "")
        return out if out_TO is None else out_TO.copy_(out)

    def silu(self, x_TI: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self.weight, self.bias, "swish", [], "")
        return out

    def gelu_tanh(self, x_TI: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self.weight, self.bias, "gelu", [], "tanh")
        return out

    def times(self, x_TI: Tensor, factor_TO: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_TI, factor_TO, self.weight, self.bias, "mul")
        return out


_Piece: TypeAlias = Callable[[int, Tensor, slice], Tensor]
"""Computes some rows of the part of that number; the slice says where the rows are."""


@dataclass(frozen=True, slots=True)
class PiecewiseLinear:
    """A product by oneDNN in pieces of `PIECE_ROWS` or `long_rows` rows and `PIECE_COLUMNS` columns, each computed on
    one thread.

    What is left of the rows is padded to a piece, so that oneDNN never sees another number: a row has the same bits for
    any count and any number of threads.
    """

    parts: tuple[OneDnnLinear, ...]
    long_rows: int

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None) -> PiecewiseLinear:
        weights = weight_OI.split(PIECE_COLUMNS)
        biases = [None] * len(weights) if bias_O is None else bias_O.split(PIECE_COLUMNS)
        parts = tuple(OneDnnLinear.of(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        long_rows = min(_long_rows(weight.dtype, tuple(weight.shape), bias_O is not None) for weight in weights)
        return cls(parts, long_rows)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        return self._in_pieces(x_TI, lambda part, x, _: self.parts[part](x), out_TO)

    def silu(self, x_TI: Tensor) -> Tensor:
        return self._in_pieces(x_TI, lambda part, x, _: self.parts[part].silu(x))

    def gelu_tanh(self, x_TI: Tensor) -> Tensor:
        return self._in_pieces(x_TI, lambda part, x, _: self.parts[part].gelu_tanh(x))

    def times(self, x_TI: Tensor, factor_TO: Tensor) -> Tensor:
        factors = _padded(factor_TO, PIECE_ROWS).split(PIECE_COLUMNS, dim=1)
        return self._in_pieces(x_TI, lambda part, x, rows: self.parts[part].times(x, factors[part][rows].contiguous()))

    def _in_pieces(self, x_TI: Tensor, piece: _Piece, out_TO: Tensor | None = None) -> Tensor:
        out = x_TI.new_empty(len(x_TI), self.shape[0]) if out_TO is None else out_TO
        x = _padded(x_TI, PIECE_ROWS)
        threads = torch.get_num_threads()
        row_groups = _shares(len(x) // PIECE_ROWS, threads)
        part_groups = _shares(len(self.parts), math.ceil(threads / len(row_groups)))

        def compute(group: tuple[range, range]) -> None:
            for part in group[1]:
                for rows in self._cut(group[0].start * PIECE_ROWS, group[0].stop * PIECE_ROWS):
                    into = out[rows, part * PIECE_COLUMNS : (part + 1) * PIECE_COLUMNS]
                    into.copy_(piece(part, x[rows], rows)[: len(into)])

        run_serially(compute, [(rows, parts) for rows in row_groups for parts in part_groups])
        return out

    def _cut(self, first: int, stop: int) -> Iterator[slice]:
        while first < stop:
            size = self.long_rows if stop - first >= self.long_rows else PIECE_ROWS
            yield slice(first, first + size)
            first += size


@lru_cache(maxsize=256)
@torch.inference_mode()
def _long_rows(dtype: torch.dtype, shape: tuple[int, ...], has_bias: bool) -> int:
    """The most rows of a piece that have the bits of `PIECE_ROWS`, for a weight of that shape; tried on one thread."""
    trial, found = _Trial.of(dtype, shape, has_bias, max(LONG_PIECES)), [PIECE_ROWS]

    def try_out(_: object) -> None:
        short = trial.in_pieces(PIECE_ROWS)
        found.extend(rows for rows in LONG_PIECES if torch.equal(trial.outcomes(slice(rows)), short[:, :rows]))

    run_serially(try_out, [None])
    return max(found)


@dataclass(frozen=True, slots=True)
class _Trial:
    """A product with random numbers. oneDNN may cut sums otherwise for each thing that is done to them."""

    linear: OneDnnLinear
    x_TI: Tensor
    factor_TO: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, ...], has_bias: bool, num_rows: int) -> _Trial:
        def drawn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        generator = torch.Generator().manual_seed(0)
        weight = drawn(*shape) * shape[1] ** -0.5
        linear = OneDnnLinear.of(weight, drawn(shape[0]) if has_bias else None)
        return cls(linear, drawn(num_rows, shape[1]), drawn(num_rows, shape[0]))

    def outcomes(self, rows: slice) -> Tensor:
        """Everything that a product is used for, of these rows: [4, rows, O]."""
        x, linear = self.x_TI[rows], self.linear
        return torch.stack([linear(x), linear.silu(x), linear.gelu_tanh(x), linear.times(x, self.factor_TO[rows])])

    def in_pieces(self, size: int) -> Tensor:
        """The same of all rows, computed so many at a time."""
        firsts = range(0, len(self.x_TI), size)
        return torch.cat([self.outcomes(slice(first, first + size)) for first in firsts], dim=1)


def _padded(x: Tensor, multiple: int) -> Tensor:
    """`x` with rows of zeros up to a multiple, where it has another number."""
    missing = -len(x) % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _shares(number: int, parts: int) -> list[range]:
    """`number` things in `parts` runs of nearly the same length, fewer where there are not as many things."""
    parts = max(1, min(number, parts))
    bounds = [number * place // parts for place in range(parts + 1)]
    return [range(*pair) for pair in pairwise(bounds)]


@lru_cache(maxsize=256)
@torch.inference_mode()
def varies(dtype: torch.dtype, shape: tuple[int, ...], has_bias: bool) -> bool:
    """Whether the bits of a product with a weight of that shape follow the number of rows or threads on this machine.

    It is tried on processors with AMX and in bfloat16: there they are known to.
    """
    if dtype != torch.bfloat16 or not torch.cpu._is_amx_tile_supported():
        return False
    trial, before = _Trial.of(dtype, shape, has_bias, PROBED_ROWS[-1]), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = trial.in_pieces(PROBED_ROWS[0])
        for threads in {*PROBED_THREADS, before}:
            torch.set_num_threads(threads)
            if any(not torch.equal(trial.outcomes(slice(rows)), expected[:, :rows]) for rows in PROBED_ROWS):
                return True
    finally:
        torch.set_num_threads(before)
    return False


class _SerialThreads:
    """Threads on which PyTorch computes with one thread each, in a pool for each number that was asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def pool(self, num_threads: int) -> ThreadPoolExecutor:
        """So many threads of this process: one that was forked has none of those of before."""
        with self._lock:
            if self._process != os.getpid():
                self._process, self._pools = os.getpid(), {}
            if num_threads not in self._pools:
                self._pools[num_threads] = _serial_pool(num_threads)
            return self._pools[num_threads]


def _serial_pool(num_threads: int) -> ThreadPoolExecutor:
    all_began = threading.Barrier(num_threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # otherwise the thread takes the process's number at its first operation
        torch.set_num_threads(1)
        all_began.wait()

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="product")
    begun = [pool.submit(begin) for _ in range(num_threads)]
    all_began.wait()
    for each in begun:
        each.result()
    # What a thread sets is also what threads get that begin later.
    torch.set_num_threads(num_threads)
    return pool


_serial_threads = _SerialThreads()
Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


def run_serially(compute: Callable[[Task], Outcome], tasks: Sequence[Task]) -> list[Outcome]:
    """What `compute` makes of each task, in order: as many at a time as PyTorch has threads here, each on a thread on
    which it has one. All have ended when it returns or raises."""

    def alone(task: Task) -> Outcome:
        with torch.inference_mode():
            return compute(task)

    num_threads = torch.get_num_threads()
    if num_threads == 1:
        return [alone(task) for task in tasks]
    pool = _serial_threads.pool(num_threads)
    under_way = [pool.submit(alone, task) for task in tasks]
    wait(under_way)
    return [each.result() for each in under_way]
