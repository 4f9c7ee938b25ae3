"""Kernels for CUDA's rows: their numbers in Triton's interpreter, and that they compile for three kinds of cards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]

NUMBERS = """
import numpy as np
import torch
import torch.nn.functional as F
from serve_app.reward_model import RewardModel, decoder, linear, rotary, row_kernels

torch.manual_seed(0)
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    for rows, width, heads, head_dim in ((5, 96, 3, 32), (2, 64, 1, 64), (1, 200, 5, 40)):
        near = {"atol": 1e-6, "rtol": 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps}
        hidden, weight = torch.randn(rows, width), torch.rand(width)
        added = torch.randn(rows, width).to(dtype)
        for more in (None, added):
            ours = hidden.clone()
            normed = row_kernels.add_norm(ours, more, weight, 1e-5, dtype)
            theirs = hidden if more is None else hidden + more
            assert torch.equal(ours, theirs)
            scale = theirs.square().mean(dim=-1, keepdim=True).add(1e-5).rsqrt()
            torch.testing.assert_close(normed, (theirs * scale * weight).to(dtype), **near)
        wide = torch.randn(rows, heads * head_dim + 8).to(dtype)  # rows of a product that holds more than these heads
        view = wide[:, : heads * head_dim].view(rows, heads, head_dim)
        table = torch.randn(rows, head_dim)
        ours, theirs = torch.empty(2, rows, heads, head_dim, dtype=dtype)
        row_kernels.rotate(view, table, ours)
        rotary.rotate(view, table, theirs)
        torch.testing.assert_close(ours, theirs, **{**near, "atol": 1e-3 if dtype != torch.float32 else 1e-6})
        in_place = wide.clone()[:, : heads * head_dim].view(rows, heads, head_dim)
        row_kernels.rotate(in_place, table, in_place)
        assert torch.equal(in_place, ours)
        rotary.rotate(view, table, view)
        assert torch.equal(view, theirs)
        both = torch.randn(rows, 2 * 1500).to(dtype)
        gate, up = both.chunk(2, dim=1)
        torch.testing.assert_close(row_kernels.silu_times(both), F.silu(gate) * up, **near)
        alone = torch.cat([row_kernels.silu_times(both[at : at + 1]) for at in range(rows)])
        assert torch.equal(row_kernels.silu_times(both), alone)
        for x in (hidden.to(dtype), 1e4 * hidden.to(dtype), torch.zeros(rows, width, dtype=dtype)):
            (_, our_scale), (_, their_scale) = row_kernels.quantized_rows(x), linear.quantized_rows(x)
            assert torch.equal(our_scale, their_scale)
            # The interpreter rounds wrongly to 8 bits (125 becomes 64): what is rounded is compared.
            unrounded = torch.empty(x.shape)
            row_kernels.quantize_kernel[(rows,)](x, unrounded, our_scale, width=width, largest=448.0, block=256)
            assert torch.equal(unrounded, x.float() / their_scale)
        one = row_kernels.add_norm(hidden[-1:].clone(), None, weight, 1e-5, dtype)
        assert torch.equal(one, row_kernels.add_norm(hidden.clone(), None, weight, 1e-5, dtype)[-1:])
try:
    row_kernels.rotate(view.transpose(0, 1), table, ours)
except ValueError as error:
    assert "contiguous within each row" in str(error)
else:
    raise AssertionError("rows of another layout were taken")
sequences = [[5, 6, 7, 8], [9] * 20, [5, 6, 7, 8, 10]]
plain = RewardModel.from_pretrained("tiny", device="cpu", dtype="float32").score_token_ids(sequences)
decoder.row_kernels_for = lambda device, dtype: row_kernels
decoder.merges_products = lambda weight, quantization: True
decoder.linear_for = lambda weight, bias, **options: linear.DenseLinear(weight, bias)
model = RewardModel.from_pretrained("tiny", device="cpu", dtype="float32")
np.testing.assert_allclose(model.score_token_ids(sequences), plain, atol=1e-5)
print("equal")
"""

COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from serve_app.reward_model import row_kernels

for capability in (80, 90, 100):
    for half in ("*fp16", "*bf16"):
        sources = (
            (row_kernels.add_norm_kernel,
             {"hidden": "*fp32", "added": half, "weight": "*fp32", "out": half, "eps": "fp32"},
             {"width": 6144, "adds": True, "block": 8192}),
            (row_kernels.rotate_kernel,
             {"heads": half, "stride": "i32", "table": "*fp32", "out": half, "out_stride": "i32"},
             {"num_heads": 48, "half": 64, "head_block": 64, "half_block": 64}),
            (row_kernels.silu_times_kernel, {"gate_up": half, "out": half, "width": "i32"}, {"block": 1024}),
        )
        if capability >= 90:  # 8-bit products are for Hopper and newer
            sources += (
                (row_kernels.quantize_kernel,
                 {"x": half, "out": "*fp8e4nv", "scales": "*fp32"},
                 {"width": 6144, "largest": 448.0, "block": 8192}),
            )
        for kernel, arguments, constants in sources:
            signature = arguments | dict.fromkeys(constants, "constexpr")
            target = GPUTarget("cuda", capability, 32)
            made = compile(ASTSource(kernel, signature, constants), target=target, options=row_kernels.UNFUSED)
            assert made.asm["cubin"]
            if kernel is row_kernels.quantize_kernel:  # to the nearest, as PyTorch's conversion
                assert "cvt.rn.satfinite.e4m3x2" in made.asm["ptx"]
print("compiled")
"""


def run(code: str, tmp_path: Path, **environment: str) -> str:
    """Run code in a process of its own: Triton chooses between interpreter and compiler as it is imported."""
    more = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | more, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_their_numbers_are_those_of_the_plain_operations(tmp_path: Path) -> None:
    assert run(NUMBERS, tmp_path, TRITON_INTERPRET="1") == "equal\n"


def test_they_compile_for_three_generations_of_cards(tmp_path: Path) -> None:
    assert run(COMPILED, tmp_path) == "compiled\n"
