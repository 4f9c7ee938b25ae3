"""The model's matrix products, each row of a result with the same bits whatever rows are beside it.

Matrix libraries choose kernels by row count, so each class keeps to counts at which the bits of a row hold still:

`OneDnnLinear` is for CPUs, and `PiecewiseLinear` for those where that is not enough: see `onednn.py`.

`DenseLinear` is for CUDA, and for CPUs without oneDNN. On CUDA the kernel, and with it the bits, may change at any
count, so products run in tiles of one fixed size, and in tiles of other sizes where a probe finds that these have its
bits.

`Fp8Linear` is for CUDA GPUs that multiply 8-bit floats: half the bytes, and other scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.reward_model.architecture import DecoderConfig, Quantization
from serve_app.reward_model.errors import UnsupportedDeviceError
from serve_app.reward_model.onednn import OneDnnLinear, PiecewiseLinear, varies

CUDA_TILE_ROWS = 1024
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
        in_pieces = varies(weight_OI.dtype, tuple(weight_OI.shape), bias_O is not None)
        return (PiecewiseLinear if in_pieces else OneDnnLinear).of(weight_OI, bias_O)
    return DenseLinear(weight_OI, bias_O, tile_rows)


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
