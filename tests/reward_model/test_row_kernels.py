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
from serve_app.reward_model import RewardModel, decoder, rotary, row_kernels

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
        gate, up = torch.randn(2, rows, 1500).to(dtype)
        theirs = F.silu(gate) * up
        torch.testing.assert_close(row_kernels.silu_times(gate, up.clone()), theirs, **near)
        alone = torch.cat([row_kernels.silu_times(gate[at : at + 1], up[at : at + 1].clone()) for at in range(rows)])
        assert torch.equal(row_kernels.silu_times(gate, up), alone)
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
             {"heads": half, "stride": "i32", "table": "*fp32", "out": half},
             {"num_heads": 48, "half": 64, "head_block": 64, "half_block": 64}),
            (row_kernels.silu_times_kernel, {"gate": half, "up": half, "count": "i32"}, {"block": 1024}),
        )
        for kernel, arguments, constants in sources:
            signature = arguments | dict.fromkeys(constants, "constexpr")
            target = GPUTarget("cuda", capability, 32)
            made = compile(ASTSource(kernel, signature, constants), target=target, options=row_kernels.UNFUSED)
            assert made.asm["cubin"]
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
