"""Bits and times of the CUDA path's parts, at the shapes of real models: what decides whether its scores hold still.

    python -m tests.benchmarks.gpu_bits products
    python -m tests.benchmarks.gpu_bits attention
    python -m tests.benchmarks.gpu_bits launches

`products`: do the rows of a tiled matrix product keep their bits at another place in a tile and beside other rows,
under which settings of the library, and at what rate for which tile? `attention`: has a sequence the same bits alone,
between others, behind a trunk, and for its last row alone? `launches`: how long the host takes to launch a pass, and
the device to do it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.reward_model.decoder import Decoder
from serve_app.reward_model.invariance import RowRule, widened
from serve_app.reward_model.linear import CUDA_TILE_ROWS, DenseLinear, whole_sums
from serve_app.reward_model.model import fit
from serve_app.reward_model.prefixes import Branch
from tests.benchmarks.bench_engine import SHAPES, hardware, random_weights, timed

SHIFTS = (1, 8, 63, 64, 129, 500, 1023)
HEADS = ((16, 8, 128), (32, 8, 128), (48, 8, 128), (14, 2, 64))
"""Query heads, key/value heads and head dimension: InternLM2-Reward's three sizes, and a small Qwen2's."""
LENGTHS = (1, 31, 129, 700, 2500)
TRUNKS = (16, 100, 515)


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("products", "attention", "launches"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--presets", nargs="+", default=["1.8b", "7b", "20b"], choices=sorted(SHAPES))
    parser.add_argument("--rows", type=int, default=16 * CUDA_TILE_ROWS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "products": lambda: list(products(arguments.presets, arguments.rows, device)),
        "attention": lambda: list(attention(device)),
        "launches": lambda: list(launches(arguments.presets[:1], arguments.rows, device)),
    }
    with torch.inference_mode():
        rows = parts[arguments.part]()
    print(json.dumps({"hardware": hardware(device), "torch": torch.__version__, arguments.part: rows}))


def products(presets: Sequence[str], num_rows: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each preset, dtype and setting: which products moved, the rule that a probe finds, TFLOP/s by tile."""
    settings: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "as PyTorch has it": nullcontext,
        "whole sums": lambda: whole_sums(device),
    }
    for preset in presets:
        for dtype in (torch.float16, torch.bfloat16):
            for setting, within in settings.items():
                with within():
                    row = _product_row(preset, num_rows, dtype, device)
                yield {"preset": preset, "dtype": str(dtype).removeprefix("torch."), "setting": setting} | row
                print(preset, dtype, setting, row, file=sys.stderr, flush=True)


def _product_row(preset: str, num_rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    hidden, _, heads, kv_heads, intermediate = SHAPES[preset]
    kv_size = 2 * kv_heads * hidden // heads
    shapes = [(hidden + kv_size, hidden), (kv_size, hidden), (hidden, hidden), (2 * intermediate, hidden)]
    shapes.append((hidden, intermediate))
    moved: list[str] = []
    linears: list[DenseLinear] = []
    seconds: dict[int, float] = {}
    for rows, columns in shapes:
        generator = torch.Generator(device=device).manual_seed(0)
        weight = (torch.randn(rows, columns, generator=generator, device=device) * columns**-0.5).to(dtype)
        x = torch.randn(num_rows, columns, generator=generator, device=device).to(dtype)
        linears.append(DenseLinear(weight, None, CUDA_TILE_ROWS))
        moved += [f"{rows} x {columns} {why}" for why in _moved(linears[-1], x)]
        for tile in (CUDA_TILE_ROWS // 2, CUDA_TILE_ROWS, 2 * CUDA_TILE_ROWS, num_rows):
            linear = DenseLinear(weight, None, tile)
            linear(x)
            times = [timed(lambda linear=linear, x=x: linear(x), device) for _ in range(3)]  # type: ignore[misc]
            seconds[tile] = seconds.get(tile, 0.0) + statistics.median(times)
    flops = 2 * num_rows * sum(rows * columns for rows, columns in shapes)
    rates = {tile: round(flops / taken / 1e12, 1) for tile, taken in seconds.items()}
    like = torch.empty(0, dtype=dtype, device=device)
    started = time.perf_counter()
    rule = widened(RowRule(CUDA_TILE_ROWS, CUDA_TILE_ROWS), [(linear, like) for linear in linears])
    probed = {
        "multiple": rule.multiple,
        "tile_rows": rule.tile_rows,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return {"moved": moved, "probed": probed, "tflops": rates}


def _moved(product: DenseLinear, x: Tensor) -> Iterator[str]:
    """What changes the bits of a row: a shift of its place, or other neighbours."""
    whole = product(x)
    shift = next((shift for shift in SHIFTS if not torch.equal(product(x.roll(shift, 0)), whole.roll(shift, 0))), None)
    if shift is not None:
        yield f"shifted by {shift}"
    other = x.clone()
    other[1::2] = 30 * torch.randn_like(other[1::2])
    if not torch.equal(product(other)[::2], whole[::2]):
        yield "beside other rows"


def attention(device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each choice of heads and dtype: what differs from the sequence alone, how far that is from float32."""
    for num_heads, num_kv_heads, head_dim in HEADS:
        for dtype in (torch.float16, torch.bfloat16):

            def drawn(rows: int, heads: int, dtype: torch.dtype = dtype, head_dim: int = head_dim) -> Tensor:
                return torch.randn(rows, heads, head_dim, device=device, dtype=dtype)

            differs: list[str] = []
            apart = 0.0
            for length in LENGTHS:
                q, k, v = drawn(length, num_heads), drawn(length, num_kv_heads), drawn(length, num_kv_heads)
                alone = _varlen(q, k, v, [length], [length])
                apart = max(apart, float((alone.float() - _exact(q, k, v)).abs().max()))
                around = [333, length, 1000]
                q_all, k_all, v_all = (torch.cat([drawn(333, len(x[0])), x, drawn(1000, len(x[0]))]) for x in (q, k, v))
                if not torch.equal(_varlen(q_all, k_all, v_all, around, around)[333 : 333 + length], alone):
                    differs.append(f"{length} between others")
                if not torch.equal(_varlen(q[-1:], k, v, [1], [length])[0], alone[-1]):
                    differs.append(f"{length}, last row alone")
                for trunk in (trunk for trunk in TRUNKS if trunk < length):
                    keys, values = (torch.cat([x[:trunk], x]) for x in (k, v))
                    if not torch.equal(_varlen(q, keys, values, [trunk, length - trunk], [trunk, length]), alone):
                        differs.append(f"{length} behind a trunk of {trunk}")
            row = {"heads": [num_heads, num_kv_heads, head_dim], "dtype": str(dtype).removeprefix("torch.")}
            yield row | {"differs": differs, "furthest_from_float32": round(apart, 5)}


def _varlen(q: Tensor, k: Tensor, v: Tensor, num_queries: Sequence[int], num_keys: Sequence[int]) -> Tensor:
    from torch.nn.attention import varlen

    call: Callable[..., Tensor] = cast(Any, varlen.varlen_attn)
    known = inspect.signature(call).parameters
    options = {name: value for name, value in {"enable_gqa": True, "num_splits": 1}.items() if name in known}
    starts_q, starts_k = (
        torch.tensor([0, *lengths], device=q.device).cumsum(0, dtype=torch.int32) for lengths in (num_queries, num_keys)
    )
    return call(q, k, v, starts_q, starts_k, max(num_queries), max(num_keys), window_size=(-1, 0), **options)


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in float32."""
    q, k, v = (x.float().transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def launches(presets: Sequence[str], num_rows: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each preset and number of rows: milliseconds until a pass is launched and until it is done."""
    for preset in presets:
        config, weights = random_weights(
            preset, device=device.type, dtype="float16" if device.type == "cuda" else "float32"
        )
        decoder = Decoder(config, weights)
        fit(decoder)
        for rows in sorted({min(CUDA_TILE_ROWS, num_rows), num_rows}):
            sequences = [[7] * 256] * max(1, rows // 256)
            branches = [Branch(place) for place in range(len(sequences))]

            def launch(decoder: Decoder = decoder, sequences: Any = sequences, branches: Any = branches) -> None:
                decoder.score(sequences, branches)

            for _ in range(2):
                launch()
            done = statistics.median(timed(launch, device) for _ in range(3))
            launched = statistics.median(_launched(launch, device) for _ in range(3))
            tokens = 256 * len(sequences)
            yield {
                "preset": preset,
                "rows": tokens,
                "launched_ms": round(1e3 * launched, 2),
                "done_ms": round(1e3 * done, 2),
                "tokens_per_s": round(tokens / done),
            }


def _launched(launch: Callable[[], None], device: torch.device) -> float:
    """Seconds until `launch` returns; on CUDA the device works on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    launch()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
