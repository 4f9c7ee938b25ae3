"""The CUDA path, emulated: everything but its kernels runs here."""

from __future__ import annotations

import json
import logging
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from serve_app.reward_model import RewardModel, decoder
from serve_app.reward_model.linear import quantized_rows
from serve_app.reward_model.rotary import rotate
from tests.benchmarks.bench_engine import SHAPES, random_weights
from tests.goldens import WEIGHTS, make_golden
from tests.reward_model.emulated_cuda import emulate_cuda


@pytest.mark.parametrize("variant", sorted(WEIGHTS))
def test_every_variant_scores_as_the_original(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_golden(variant, tmp_path / variant)
    emulate_cuda(monkeypatch)
    model = RewardModel.from_pretrained(str(folder), device="cpu", dtype="float32", invariant=False)
    cases = json.loads((folder / "scores.json").read_text())[::4]
    scores = model.score_token_ids([case["input_ids"] for case in cases])
    np.testing.assert_allclose(scores, [case["score"] for case in cases], atol=1e-3, rtol=1e-4)


def test_sequences_that_share_a_prefix_score_as_they_do_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_cuda(monkeypatch)
    model = RewardModel.from_pretrained("tiny", device="cpu", dtype="float32", invariant=False)
    prompt, turn = list(range(100, 190)), list(range(300, 340))
    sequences = [[*prompt, *[200 + n] * n] for n in (1, 30, 7)]
    sequences += [[*prompt, *turn, 7], [*prompt, *turn, 9, 9], [*prompt, *turn], [5, 6, 7]]
    shared = model.score_token_ids(sequences)
    model.scorer.share_prompts = False
    np.testing.assert_allclose(shared, model.score_token_ids(sequences), atol=1e-4)


class Launches(TorchDispatchMode):
    """Counts what would launch a kernel: every operation but views and new memory."""

    FREE = (
        *("view", "slice", "transpose", "split", "expand", "select", "unsqueeze", "detach", "t.", "as_strided"),
        *("empty", "new_empty", "lift_fresh"),
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        self.count += not name.startswith(self.FREE) and not name.endswith("_unsafe_view.default")
        return func(*args, **(kwargs or {}))


class PlainKernels:
    """`row_kernels` in plain operations; each call counts as the one kernel that it is there."""

    def __init__(self, launches: Launches) -> None:
        self.launches = launches

    def add_norm(
        self, hidden_TH: Tensor, added_TH: Tensor | None, weight_H: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        self.launches.count += 1
        with _disable_current_modes():
            if added_TH is not None:
                hidden_TH += added_TH
            scale = hidden_TH.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
            return hidden_TH.mul(scale).mul_(weight_H).to(dtype)

    def rotate(self, heads_TAD: Tensor, table_TD: Tensor, out_TAD: Tensor) -> None:
        self.launches.count += 1
        with _disable_current_modes():
            rotate(heads_TAD, table_TD, out_TAD)

    def silu_times(self, gate_up_TJ: Tensor) -> Tensor:
        self.launches.count += 1
        with _disable_current_modes():
            gate, up = gate_up_TJ.chunk(2, dim=1)
            return F.silu(gate) * up

    def quantized_rows(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        self.launches.count += 1
        with _disable_current_modes():
            return quantized_rows(x_TI)


def launches_of(num_layers: int, patch: pytest.MonkeyPatch, *, with_kernels: bool) -> tuple[int, list[float]]:
    """Kernels of a pass of 1,024 rows, and its scores."""
    launches = Launches()
    emulate_cuda(patch)
    emulated: Any = varlen.varlen_attn

    @wraps(emulated)
    def attention(*args: Any, **options: Any) -> Any:
        launches.count += 1
        with _disable_current_modes():
            return emulated(*args, **options)

    patch.setattr(varlen, "varlen_attn", attention)
    kernels = PlainKernels(launches) if with_kernels else None
    patch.setattr(decoder, "row_kernels_for", lambda device, dtype: kernels)
    patch.setitem(SHAPES, "tiny", (64, num_layers, 4, 2, 96))
    config, weights = random_weights("tiny", device="cpu", dtype="float32")
    model = RewardModel(decoder.Decoder(config, weights, invariant=False), Path())
    sequences = [[5, 6, 7] * 100, [9] * 40]
    model.score_token_ids(sequences)
    launches.count = 0
    with launches:
        scores = model.score_token_ids(sequences)
    return launches.count, scores.tolist()


def test_a_layer_launches_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small batch waits for the host that launches, not for the card."""
    a_layer = {}
    for with_kernels in (False, True):
        (two, _), (three, scores) = (launches_of(layers, monkeypatch, with_kernels=with_kernels) for layers in (2, 3))
        a_layer[with_kernels] = (three - two, scores)
    (plain, expected), (fused, found) = a_layer[False], a_layer[True]
    assert found == pytest.approx(expected, abs=1e-5)
    assert fused <= 11, f"{fused} with kernels, {plain} without"
    assert plain > 2 * fused


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert decoder.row_kernels_for(torch.device("cpu"), torch.float32) is None
    with caplog.at_level(logging.WARNING):
        assert decoder.row_kernels_for(torch.device("cuda"), torch.float32) is None  # a build without CUDA
    assert "the engine runs without its kernels" in caplog.text
