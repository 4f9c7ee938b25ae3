"""The model's matrix products, each row of a result with the same bits whatever rows are beside it.

Matrix libraries choose kernels by row count, so each class keeps to counts at which the bits of a row hold still:

`OneDnnLinear` is for CPUs: the weight is laid out once as the kernels want it, and SiLU and multiplication happen on
the float32 sums before they are rounded. A row has the same bits for any count from 16 up and any number of threads,
where the weight's rows are a multiple of 16 too, as in every real model.

`PiecewiseLinear` is for CPUs whose kernels are no such thing, as Intel's with AMX in bfloat16, where the order of a sum
follows the number of rows and of threads: oneDNN gets pieces of one size, each on one thread, and threads share them.

`DenseLinear` is for CUDA, and for CPUs without oneDNN. On CUDA the kernel, and with it the bits, may change at any
count, so products run in tiles of one fixed size, and in tiles of other sizes where a probe finds that these have its
bits.

`Fp8Linear` is for CUDA GPUs that multiply 8-bit floats: half the bytes, and other scores.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Protocol, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.reward_model.architecture import DecoderConfig, Quantization
from serve_app.reward_model.errors import UnsupportedDeviceError

CUDA_TILE_ROWS = 1024
FEW_THREADS, FEW_ROWS = (1, 2, 16), (16, 48, 512)
"""What tells the products apart whose bits vary; `invariance` tries more once they are laid out."""
FP8 = torch.float8_e4m3fn
FP8_MULTIPLE = 16
Quantize: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rows as 8-bit floats, and the scale [T, 1] that each was divided by."""
REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
"""Settings of `torch.backends.cuda.matmul`: whether sums may be in 16 bits, and whether they may be cut."""
# PyTorch runs an element-wise operation of up to this many elements on one thread (ATen's GRAIN_SIZE).
SERIAL_ELEMENTS = 32768


class Linear(Protocol):
    """`x @ weight.T + bias`. Shape legend: T rows, I and O features."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        ...

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        """The product: [T, O], in `out` where it is given."""
        ...

    def silu(self, x_TI: Tensor) -> Tensor:
        """SiLU of the product: [T, O]."""
        ...

    def gelu_tanh(self, x_TI: Tensor) -> Tensor:
        """GELU, in its tanh approximation, of the product: [T, O]."""
        ...

    def times(self, x_TI: Tensor, factor_TO: Tensor) -> Tensor:
        """The product, multiplied element by element with `factor`: [T, O]."""
        ...


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


PIECE_ROWS, LONG_PIECES, PIECE_COLUMNS = 64, (256, 128), 512
"""The size of a product's pieces. In 64 rows AMX is 0.55 to 0.85 times as fast as in hundreds, in 32 half of that; so
pieces are longer where that is found to keep the bits. A lone request has few rows; its threads share the columns."""
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
        factors = padded_rows(factor_TO, PIECE_ROWS).split(PIECE_COLUMNS, dim=1)
        return self._in_pieces(x_TI, lambda part, x, rows: self.parts[part].times(x, factors[part][rows].contiguous()))

    def _in_pieces(self, x_TI: Tensor, piece: _Piece, out_TO: Tensor | None = None) -> Tensor:
        out = x_TI.new_empty(len(x_TI), self.shape[0]) if out_TO is None else out_TO
        x = padded_rows(x_TI, PIECE_ROWS)
        threads = torch.get_num_threads()
        row_groups = _shares(len(x) // PIECE_ROWS, threads)
        part_groups = _shares(len(self.parts), math.ceil(threads / len(row_groups)))

        def compute(group: tuple[range, range]) -> None:
            with torch.inference_mode():
                for part in group[1]:
                    for rows in self._cut(group[0].start * PIECE_ROWS, group[0].stop * PIECE_ROWS):
                        into = out[rows, part * PIECE_COLUMNS : (part + 1) * PIECE_COLUMNS]
                        into.copy_(piece(part, x[rows], rows)[: len(into)])

        run_serially(compute, [(rows, parts) for rows in row_groups for parts in part_groups], threads)
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
        pieces = [trial.outcomes(slice(first, first + PIECE_ROWS)) for first in range(0, trial.num_rows, PIECE_ROWS)]
        short = torch.cat(pieces, dim=1)
        found.extend(rows for rows in LONG_PIECES if torch.equal(trial.outcomes(slice(rows)), short[:, :rows]))

    run_serially(try_out, [None], torch.get_num_threads())
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

    @property
    def num_rows(self) -> int:
        return len(self.x_TI)

    def outcomes(self, rows: slice) -> Tensor:
        """Everything that a product is used for, of these rows: [4, rows, O]."""
        x, linear = self.x_TI[rows], self.linear
        return torch.stack([linear(x), linear.silu(x), linear.gelu_tanh(x), linear.times(x, self.factor_TO[rows])])


def padded_rows(x: Tensor, multiple: int) -> Tensor:
    """`x` with rows of zeros up to a multiple, where it has another number."""
    missing = -len(x) % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _shares(number: int, parts: int) -> list[range]:
    """`number` things in `parts` runs of nearly the same length, fewer where there are not as many things."""
    parts = max(1, min(number, parts))
    bounds = [number * place // parts for place in range(parts + 1)]
    return [range(*pair) for pair in pairwise(bounds)]


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """A product by the device's matrix library, in calls of `tile_rows` rows where that is set."""

    weight: Tensor
    bias: Tensor | None
    tile_rows: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        out_TO = x_TI.new_empty(len(x_TI), len(self.weight)) if out_TO is None else out_TO
        weight_IO = self.weight.t()
        for x, out in _in_tiles(self.tile_rows, x_TI, out_TO):
            if self.bias is None:
                torch.mm(x, weight_IO, out=out)
            else:
                torch.addmm(self.bias, x, weight_IO, out=out)
        return out_TO

    def silu(self, x_TI: Tensor) -> Tensor:
        return silu_(self(x_TI))

    def gelu_tanh(self, x_TI: Tensor) -> Tensor:
        return gelu_tanh_(self(x_TI))

    def times(self, x_TI: Tensor, factor_TO: Tensor) -> Tensor:
        return self(x_TI).mul_(factor_TO)

    def part(self, first: int, stop: int) -> DenseLinear:
        """The columns `first` to `stop` - 1 of the product; the weight is shared."""
        bias = None if self.bias is None else self.bias[first:stop]
        return DenseLinear(self.weight[first:stop], bias, self.tile_rows)


@dataclass(frozen=True, slots=True)
class Fp8Linear:
    """A product of 8-bit floats: one scale for each row of the weight, and one for each token, found as it comes.

    Scales bring the largest magnitude of a row to the format's largest number. `weight` is [O, I] in float8_e4m3fn,
    `weight_scale` [1, O] in float32. Results are bfloat16, as `torch._scaled_mm` wants it with scales for each row.
    `quantized` makes 8-bit floats of tokens.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    tile_rows: int | None
    quantized: Quantize

    @classmethod
    def of(
        cls, weight_OI: Tensor, bias_O: Tensor | None, *, tile_rows: int | None, quantized: Quantize | None = None
    ) -> Fp8Linear:
        check_quantization("fp8", weight_OI.device)
        weight, scale_O1 = quantized_rows(weight_OI)
        bias = None if bias_O is None else bias_O.to(torch.bfloat16)
        return cls(weight, scale_O1.t().contiguous(), bias, tile_rows, quantized or quantized_rows)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        x8_TI, scale_T1 = self.quantized(x_TI)
        product_TO = out_TO
        if product_TO is None or product_TO.dtype != torch.bfloat16:
            product_TO = x_TI.new_empty(len(x_TI), len(self.weight), dtype=torch.bfloat16)
        weight_IO = self.weight.t()
        for x8, scale, out in _in_tiles(self.tile_rows, x8_TI, scale_T1, product_TO):
            torch._scaled_mm(
                x8,
                weight_IO,
                scale_a=scale,
                scale_b=self.weight_scale,
                bias=self.bias,
                out_dtype=torch.bfloat16,
                out=out,
            )
        return product_TO if out_TO is None or out_TO is product_TO else out_TO.copy_(product_TO)

    def silu(self, x_TI: Tensor) -> Tensor:
        return silu_(self(x_TI))

    def gelu_tanh(self, x_TI: Tensor) -> Tensor:
        return gelu_tanh_(self(x_TI))

    def times(self, x_TI: Tensor, factor_TO: Tensor) -> Tensor:
        return self(x_TI).mul_(factor_TO)

    def part(self, first: int, stop: int) -> Fp8Linear:
        """The columns `first` to `stop` - 1 of the product; the weight is shared."""
        bias = None if self.bias is None else self.bias[first:stop]
        scale_1O = self.weight_scale[:, first:stop].contiguous()
        return Fp8Linear(self.weight[first:stop], scale_1O, bias, self.tile_rows, self.quantized)


AnyLinear = TypeVar("AnyLinear", bound=Linear)
MergedLinear: TypeAlias = DenseLinear | Fp8Linear
"""A product whose columns may be taken apart."""


def check_sizes(quantization: Quantization, config: DecoderConfig) -> None:
    """Raise `UnsupportedDeviceError` where the model's matrices are none that can be quantised so."""
    sides = (config.hidden_size, config.query_size, config.kv_size, config.intermediate_size)
    if quantization == "fp8" and (odd := [side for side in sides if side % FP8_MULTIPLE]):
        raise UnsupportedDeviceError(
            f"fp8 multiplies matrices whose sides are multiples of {FP8_MULTIPLE}, and the model has {odd[0]}: leave "
            "the quantization out"
        )


def check_quantization(quantization: Quantization, device: torch.device) -> None:
    """Raise `UnsupportedDeviceError` where a GPU does not multiply 8-bit floats; a CPU does, slowly."""
    if quantization == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise UnsupportedDeviceError(
            f"fp8 needs a GPU of the Hopper generation or newer, not {torch.cuda.get_device_name(device)}: leave the "
            "quantization out, or take another GPU"
        )


def linear_for(
    weight_OI: Tensor,
    bias_O: Tensor | None,
    *,
    quantization: Quantization = "none",
    invariant: bool = True,
    quantized: Quantize | None = None,
) -> Linear:
    """The product that suits the weight's device and dtype. `invariant` costs something on CUDA only.

    `quantized` makes 8-bit floats of tokens, where there is a kernel for it.
    """
    tile_rows = CUDA_TILE_ROWS if weight_OI.device.type == "cuda" and invariant else None
    if quantization == "fp8":
        return Fp8Linear.of(weight_OI, bias_O, tile_rows=tile_rows, quantized=quantized)
    if OneDnnLinear.supports(weight_OI):
        in_pieces = varies_by_rows(weight_OI.dtype, tuple(weight_OI.shape), bias_O is not None)
        return (PiecewiseLinear if in_pieces else OneDnnLinear).of(weight_OI, bias_O)
    return DenseLinear(weight_OI, bias_O, tile_rows)


@lru_cache(maxsize=256)
@torch.inference_mode()
def varies_by_rows(dtype: torch.dtype, shape: tuple[int, ...], has_bias: bool) -> bool:
    """Whether oneDNN's bits of a product with a weight of that shape follow the number of rows or threads here: it is
    tried, on processors with AMX and in bfloat16.
    """
    if dtype != torch.bfloat16 or not torch.cpu._is_amx_tile_supported():
        return False
    trial = _Trial.of(dtype, shape, has_bias, FEW_ROWS[-1])
    before, first = torch.get_num_threads(), FEW_ROWS[0]
    expected = trial.outcomes(slice(first))
    try:
        for threads in FEW_THREADS:
            torch.set_num_threads(threads)
            for num_rows in FEW_ROWS:
                if not torch.equal(trial.outcomes(slice(num_rows))[:, :first], expected):
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


def run_serially(compute: Callable[[Task], None], tasks: Sequence[Task], num_threads: int) -> None:
    """Run the tasks, `num_threads` at a time, each with one thread of PyTorch's, and return when all are done."""
    if num_threads == 1:
        for task in tasks:
            compute(task)
        return
    for _ in _serial_threads.pool(num_threads).map(compute, tasks):
        pass


def merges_products(weight: Tensor, quantization: Quantization) -> bool:
    """Whether products of one input run as one: each is a launch on CUDA. oneDNN gains nothing by it (measured), and
    could not activate the gate on the way.
    """
    return quantization == "fp8" or not OneDnnLinear.supports(weight)


@contextmanager
def whole_sums(device: torch.device) -> Iterator[None]:
    """Within it, CUDA's products in 16 bits sum each element in one piece, and in float32.

    cuBLAS may cut a long sum into pieces and add these up in 16 bits, as many as suit the number of rows. cuBLASLt does
    without where it is told to. The settings are the process's: those from before come back at the end, and a thread
    that multiplies meanwhile is under ours.
    """
    if device.type != "cuda":
        yield
        return
    matmul, library = torch.backends.cuda.matmul, torch.backends.cuda.preferred_blas_library()
    before = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in REDUCTIONS}
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        for name in REDUCTIONS:
            setattr(matmul, name, (False, False))
        yield
    finally:
        for name, setting in before.items():
            setattr(matmul, name, setting)
        torch.backends.cuda.preferred_blas_library(library)


def silu_(x_TO: Tensor) -> Tensor:
    """SiLU in place, each row with the same bits among any others."""
    return rowwise_(x_TO, _silu_)


def gelu_tanh_(x_TO: Tensor) -> Tensor:
    """GELU's tanh approximation in place, each row with the same bits among any others."""
    return rowwise_(x_TO, _gelu_tanh_)


def rowwise_(x_TO: Tensor, function_: Callable[[Tensor], object]) -> Tensor:
    """An element-wise function in place, each row with the same bits among any others.

    On CPU PyTorch computes the last few elements of each thread's share with scalar code, whose exponential may differ
    from the vector code's in the last bit. So the shares must be whole rows of a multiple of 32 elements, as every real
    model has: as many rows as the threads divide evenly are shared among them, the rest run in pieces that one thread
    takes whole.
    """
    if x_TO.device.type != "cpu":
        function_(x_TO)
        return x_TO
    num_rows, width = x_TO.shape
    threads = torch.get_num_threads()
    even_rows = num_rows - num_rows % threads
    # With fewer elements PyTorch would use fewer threads, and cut the rows elsewhere.
    shared_rows = even_rows if even_rows * width > (threads - 1) * SERIAL_ELEMENTS else 0
    pieces = [slice(0, shared_rows), *_pieces(num_rows, max(1, SERIAL_ELEMENTS // width), first=shared_rows)]
    for rows in pieces:
        function_(x_TO[rows])
    return x_TO


def _silu_(rows: Tensor) -> object:
    return F.silu(rows, inplace=True)


def _gelu_tanh_(rows: Tensor) -> object:
    return rows.copy_(F.gelu(rows, approximate="tanh"))


def _in_tiles(tile_rows: int | None, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same `tile_rows` rows of each tensor at a time, what is left at the end; all at once for None."""
    return zip(*(rows.split(tile_rows or len(rows)) for rows in tensors), strict=True)


def with_tiles(linear: AnyLinear, tile_rows: int | None) -> AnyLinear:
    """The same product in calls of `tile_rows` rows, where it runs in tiles at all; the weight is shared."""
    if isinstance(linear, DenseLinear | Fp8Linear) and linear.tile_rows is not None:
        return replace(linear, tile_rows=tile_rows)
    return linear


def _pieces(stop: int, step: int, *, first: int = 0) -> list[slice]:
    return [slice(start, min(start + step, stop)) for start in range(first, stop, step)]


def quantized_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as 8-bit floats, and the scale [T, 1] that each was divided by."""
    largest_T1 = x_TI.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12)
    # By a tensor, since CUDA multiplies by the rounded reciprocal of a number.
    scale_T1 = largest_T1 / torch.full_like(largest_T1, torch.finfo(FP8).max)
    return (x_TI.float() / scale_T1).to(FP8), scale_T1
