"""The row counts that batches are padded to, and a probe: does a row keep its bits on this machine?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.reward_model.linear import CUDA_TILE_ROWS, Linear, with_tiles
from serve_app.reward_model.onednn import PIECE_ROWS

MIN_ROWS = 16
CPU_CHUNK_ROWS = 512
PROBED_THREADS = (1, 2, 4, 8, 16)
PROBED_SHIFTS = (1, 5, 100)
CUDA_MULTIPLES = (128, 256, 512)
"""Rows that a batch may have a multiple of on CUDA, the best first, before that of the tiles."""
LONGEST_TILE_ROWS = 8192
"""Rows from which longer products are no faster (measured on an H100)."""


@dataclass(frozen=True, slots=True)
class RowRule:
    """Batches have a multiple of `multiple` rows, and products run in calls of `tile_rows` where that is set, what is
    left in one call. What is done row by row takes `chunk_rows` at once where that is set.

    The chunks of a CPU keep intermediate results in its cache.
    """

    multiple: int
    tile_rows: int | None = None
    chunk_rows: int | None = None

    @classmethod
    def for_device(cls, device: torch.device, *, invariant: bool = True) -> RowRule:
        if device.type != "cuda":
            return cls(multiple=MIN_ROWS, chunk_rows=CPU_CHUNK_ROWS)
        return cls(multiple=CUDA_TILE_ROWS, tile_rows=CUDA_TILE_ROWS) if invariant else cls(multiple=MIN_ROWS)

    def padded(self, num_rows: int) -> int:
        return math.ceil(num_rows / self.multiple) * self.multiple

    def chunks(self, num_rows: int, *, threads: int = 1) -> Iterator[slice]:
        """The chunks of so many rows; for several threads as many as there are, as far as each has a piece of rows."""
        step = self.chunk_rows or num_rows
        if threads > 1:
            step = min(step, math.ceil(num_rows / threads / PIECE_ROWS) * PIECE_ROWS)
        return (slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step))


@torch.inference_mode()
def find_variance(
    rule: RowRule,
    linears: Sequence[Linear],
    like: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> str | None:
    """What changes its bits on this machine with the rows beside it or the number of threads, or None.

    Tries products of the model's own shapes and attention blocks, of the dtype and on the device of `like`, on CPU
    with several thread counts: milliseconds to a second. `attend` takes rows of queries, keys and values
    [rows, heads, head_dim]; None is PyTorch's attention.
    """
    before = torch.get_num_threads()
    try:
        for linear in {linear.shape: linear for linear in linears}.values():
            if _product_varies(rule, linear, like):
                return f"a matrix product of shape {linear.shape}"
        if like.device.type == "cpu" and _attention_varies(like, num_heads, num_kv_heads, head_dim, attend):
            return f"attention with {num_heads} heads of {head_dim}"
    finally:
        torch.set_num_threads(before)
    return None


@torch.inference_mode()
def widened(rule: RowRule, linears: Sequence[tuple[Linear, Tensor]]) -> RowRule:
    """A rule of fewer padding rows and longer tiles than those of `rule`, with the bits that these give every product.

    Each product comes with a tensor of its dtype and device. Every number of rows that a call may then have is tried:
    a second for a model of 7 billion weights on an H100.
    """
    assert rule.tile_rows is not None
    for multiple in (*CUDA_MULTIPLES, rule.tile_rows):
        longest = LONGEST_TILE_ROWS
        for linear, like in linears:
            longest = _longest_alike(linear, like, rule.tile_rows, multiple, longest)
        if longest >= rule.tile_rows:
            return RowRule(multiple=multiple, tile_rows=longest)
    return rule


def _longest_alike(linear: Linear, like: Tensor, tile_rows: int, multiple: int, longest: int) -> int:
    """The most rows, up to `longest`, up to which every multiple of `multiple` has the bits of tiles; 0 for none.

    Rows of a product are tried at both ends of it, so that each is at another place than in its tile.
    """
    generator = torch.Generator(device=like.device).manual_seed(1)
    x = torch.randn(longest, linear.shape[1], generator=generator, device=like.device).to(like)
    in_tiles, whole = with_tiles(linear, tile_rows)(x), with_tiles(linear, longest)
    for num_rows in range(multiple, longest + 1, multiple):
        for rows in (slice(num_rows), slice(longest - num_rows, longest)):
            if not torch.equal(whole(x[rows]), in_tiles[rows]):
                return num_rows - multiple
    return longest


def _product_varies(rule: RowRule, linear: Linear, like: Tensor) -> bool:
    num_rows = rule.multiple * 4
    x = torch.randn(num_rows, linear.shape[1], generator=torch.Generator().manual_seed(0)).to(like)
    for product in (linear, linear.silu, linear.gelu_tanh):
        whole = product(x)
        if any(not torch.equal(product(other)[kept], whole[rows]) for other, kept, rows in _elsewhere(x)):
            return True
        for threads in PROBED_THREADS if like.device.type == "cpu" else (torch.get_num_threads(),):
            torch.set_num_threads(threads)
            for rows in (rule.multiple, rule.multiple * 3):
                if not torch.equal(product(x[-rows:]), whole[-rows:]):
                    return True
    return False


def _elsewhere(x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The rows of `x` at other places and among other neighbours: rows that hold them, and which are which of `x`.

    Whole tiles hide what depends on a row's place in its tile, so the shifts are no multiples of one.
    """
    places = torch.arange(len(x), device=x.device)
    for shift in PROBED_SHIFTS:
        yield x.roll(shift, dims=0), places, places.roll(shift)
    among_others = x.roll(len(x) // 2 + 1, dims=0)
    among_others[::3] = x[::3]
    yield among_others, places[::3], places[::3]


def _attention_varies(
    like: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
) -> bool:
    generator = torch.Generator().manual_seed(0)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = (torch.randn(1, count, 192, head_dim, generator=generator).to(like) for count in heads)
    found = []
    for threads in PROBED_THREADS:
        torch.set_num_threads(threads)
        for rows in (16, 64):
            if attend is None:
                result = F.scaled_dot_product_attention(q[:, :, :rows], k, v, enable_gqa=True)
            else:
                result = attend(*(heads[0].transpose(0, 1) for heads in (q[:, :, :rows], k, v)))
            found.append((rows, result))
    first = dict(reversed(found))
    return any(not torch.equal(result, first[rows]) for rows, result in found)
