"""The matrix products: right, and each row the same whatever rows are beside it."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from serve_app.reward_model import RewardModel, UnsupportedDeviceError
from serve_app.reward_model.invariance import LONGEST_TILE_ROWS, RowRule, _product_varies, widened
from serve_app.reward_model.linear import (
    REDUCTIONS,
    DenseLinear,
    Fp8Linear,
    Linear,
    linear_for,
    whole_sums,
)
from serve_app.reward_model.onednn import OneDnnLinear, PiecewiseLinear, varies
from serve_app.reward_model.token_budget import CUDA_MAX_TOKEN_BUDGET, TRIAL_TOKENS, budget_for
from tests.cluster.reward_pool.checkpoints import reshaped

OUT, IN = 96, 64


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def made(kind: str, dtype: torch.dtype) -> tuple[Linear, Tensor, Tensor]:
    weight, bias = (drawn(OUT, IN) / 8).to(dtype), drawn(OUT).to(dtype)
    if kind in ("oneDNN", "pieces") and not OneDnnLinear.supports(weight):
        pytest.skip(f"oneDNN has no {dtype} products on this processor")
    linears: dict[str, Callable[[], Linear]] = {
        "oneDNN": lambda: OneDnnLinear.of(weight, bias),
        "pieces": lambda: PiecewiseLinear.of(weight, bias),
        "dense": lambda: DenseLinear(weight, bias),
        "tiled": lambda: DenseLinear(weight, bias, tile_rows=16),
        "fp8": lambda: Fp8Linear.of(weight, bias, tile_rows=16),
    }
    return linears[kind](), weight, bias


@pytest.mark.parametrize("kind", ["oneDNN", "pieces", "dense", "tiled", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_right(kind: str, dtype: torch.dtype) -> None:
    linear, weight, bias = made(kind, dtype)
    x, factor = drawn(48, IN).to(dtype), drawn(48, OUT).to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    tolerance = 0.3 if kind == "fp8" else {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert linear.shape == (OUT, IN)
    for ours, theirs in (
        (linear(x), exact),
        (linear.silu(x), torch.nn.functional.silu(exact)),
        (linear.times(x, factor.clone()), exact * factor.double()),
    ):
        assert ours.shape == (48, OUT)
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance / 5)


@pytest.mark.parametrize("kind", ["oneDNN", "pieces", "tiled", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("threads")
def test_a_row_has_the_same_bits_among_any_others(kind: str, dtype: torch.dtype) -> None:
    linear, _, _ = made(kind, dtype)
    x, factor = drawn(640, IN).to(dtype), drawn(640, OUT).to(dtype)
    torch.set_num_threads(1)
    whole = (linear(x), linear.silu(x), linear.times(x, factor.clone()))
    for num_threads in (1, 2, 3, 4):
        torch.set_num_threads(num_threads)
        for rows in (slice(0, 16), slice(16, 64), slice(608, 640), slice(0, 512)):
            part = (linear(x[rows]), linear.silu(x[rows]), linear.times(x[rows], factor[rows].clone()))
            assert all(torch.equal(ours, theirs[rows]) for ours, theirs in zip(part, whole, strict=True))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several columns of pieces, the last of which is narrower, and long ones."""
    monkeypatch.setattr("serve_app.reward_model.onednn.PIECE_COLUMNS", 80)


@pytest.mark.usefixtures("threads", "small_pieces")
def test_pieces_have_one_size_whatever_the_rows_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where oneDNN's sums depend on the number of rows and of threads, as with AMX."""
    sizes: set[tuple[int, int]] = set()
    plain = OneDnnLinear.__call__

    def noted(linear: OneDnnLinear, x: Tensor, out: Tensor | None = None) -> Tensor:
        sizes.add((len(x), torch.get_num_threads()))
        return plain(linear, x, out)

    monkeypatch.setattr(OneDnnLinear, "__call__", noted)
    weight, bias = drawn(OUT, IN) / 8, drawn(OUT)
    linear = replace(PiecewiseLinear.of(weight, bias), long_rows=128)
    x = drawn(401, IN)
    exact, kept = x.double() @ weight.double().T + bias.double(), torch.full((401, OUT + 3), 7.0)
    sizes.clear()
    for num_threads in (1, 2, 3, 5):
        torch.set_num_threads(num_threads)
        for num_rows in (1, 58, 64, 130, 401):
            torch.testing.assert_close(linear(x[:num_rows]).double(), exact[:num_rows], atol=1e-5, rtol=1e-5)
        assert torch.get_num_threads() == num_threads
    assert linear(x, kept[:, :OUT]).data_ptr() == kept.data_ptr()
    torch.testing.assert_close(kept[:, :OUT].double(), exact, atol=1e-5, rtol=1e-5)
    assert (kept[:, OUT:] == 7).all()
    assert sizes == {(64, 1), (128, 1)}


@pytest.mark.usefixtures("threads")
def test_an_error_in_a_piece_is_the_callers() -> None:
    linear = PiecewiseLinear.of(drawn(OUT, IN), None)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        with pytest.raises(RuntimeError):
            linear(drawn(70, IN + 1))


def test_products_that_vary_with_the_rows_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(OUT, IN).bfloat16()
    if not OneDnnLinear.supports(weight):
        pytest.skip("oneDNN has no torch.bfloat16 products on this processor")
    plain = OneDnnLinear.__call__
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    for is_varied in (False, True):
        varies.cache_clear()
        monkeypatch.setattr(
            OneDnnLinear, "__call__", lambda linear, x, by=int(is_varied): plain(linear, x) * (1 + by * len(x))
        )
        assert isinstance(linear_for(weight, None), PiecewiseLinear if is_varied else OneDnnLinear)
    assert isinstance(linear_for(weight.float(), None), OneDnnLinear)
    varies.cache_clear()


@pytest.mark.parametrize("shape", [(1024, 1024), (512, 1024), (2816, 1024), (1024, 2816)])
@pytest.mark.usefixtures("threads")
def test_rows_of_real_sizes_keep_their_bits(shape: tuple[int, int]) -> None:
    """As they do not with oneDNN alone on processors with AMX."""
    if not OneDnnLinear.supports(torch.empty(0, dtype=torch.bfloat16)):
        pytest.skip("oneDNN has no torch.bfloat16 products on this processor")
    linear = linear_for((drawn(*shape) / 32).bfloat16(), None)
    for other in (RowRule(multiple=16), RowRule(multiple=80)):
        assert not _product_varies(other, linear, torch.empty(0, dtype=torch.bfloat16))


def test_the_device_and_the_dtype_choose_the_product() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = drawn(OUT, IN).to(dtype)
        own = (OneDnnLinear, PiecewiseLinear) if OneDnnLinear.supports(weight) else DenseLinear
        assert isinstance(linear_for(weight, None), own)
    assert not OneDnnLinear.supports(drawn(OUT, IN).half())
    assert isinstance(linear_for(drawn(OUT, IN), None, quantization="fp8"), Fp8Linear)


def test_fp8_refuses_sides_that_are_no_multiples_of_16_before_weights_are_read(
    tiny: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.reward_model.model.load_weights", lambda *args, **more: pytest.fail("were read"))
    for name, size in (("intermediate_size", 376), ("hidden_size", 136)):
        folder = reshaped(tiny.folder, tmp_path / name, **{name: size})
        with pytest.raises(UnsupportedDeviceError, match=f"multiples of 16, and the model has {size}"):
            RewardModel.from_pretrained(folder, device="cpu", quantization="fp8")


def test_sums_are_whole_within_and_as_they_were_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is a stand-in: a build for CPUs has no other to choose."""
    matmul = torch.backends.cuda.matmul
    library = ["cublas"]

    def preferred(wanted: str | None = None) -> str:
        library[0] = wanted or library[0]
        return library[0]

    def settings() -> list[bool]:
        return [getattr(matmul, name + end) for name in REDUCTIONS for end in ("", "_split_k")]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    matmul.allow_bf16_reduced_precision_reduction = (False, True)
    before = settings()
    try:
        with whole_sums(torch.device("cuda")):
            within = settings(), library[0]
        assert within == ([False] * 4, "cublaslt")
        assert (settings(), library) == (before, ["cublas"])
        with whole_sums(torch.device("cpu")):
            assert settings() == before
    finally:
        matmul.allow_bf16_reduced_precision_reduction = (True, True)


def test_fp8_drifts_a_little_and_keeps_the_contract(
    golden_folder: Any, golden_fp32: RewardModel, goldens: list[dict[str, Any]]
) -> None:
    model = RewardModel.from_pretrained(str(golden_folder), device="cpu", dtype="bfloat16", quantization="fp8")
    sequences = [golden["input_ids"] for golden in goldens[:24]]
    exact, ours = golden_fp32.score_token_ids(sequences), model.score_token_ids(sequences)
    assert 0.01 < np.abs(ours - exact).mean() < 0.5
    flips = [(exact[a] < exact[b]) != (ours[a] < ours[b]) for a, b in combinations(range(24), 2)]
    assert np.mean(flips) < 0.1
    assert [model.score_token_ids([ids])[0] for ids in sequences[:5]] == ours[:5].tolist()


@pytest.mark.parametrize(
    ("free_gigabytes", "bytes_per_token", "budget"),
    [(80, 200_000, CUDA_MAX_TOKEN_BUDGET), (10, 400_000, 4 * TRIAL_TOKENS), (0.1, 400_000, 175), (0, 400_000, 1)],
)
def test_the_budget_leaves_a_part_of_the_memory(free_gigabytes: float, bytes_per_token: int, budget: int) -> None:
    assert budget_for(int(free_gigabytes * 1e9), bytes_per_token) == budget


@dataclass(frozen=True, slots=True)
class Moody(DenseLinear):
    """A product whose bits are those of a row alone, but in calls of the numbers of rows in `moods`."""

    moods: Container[int] = ()

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        product_TO = (x_TI[:, None] * self.weight).sum(dim=2)
        for rows in product_TO.split(self.tile_rows or len(x_TI)):
            if len(rows) in self.moods:
                rows *= 1 + 2**-20
        return product_TO


@pytest.mark.parametrize(
    ("moods", "multiple", "tile_rows"),
    [
        (range(0), 128, LONGEST_TILE_ROWS),
        (range(100), 128, LONGEST_TILE_ROWS),
        (range(129), 256, LONGEST_TILE_ROWS),
        (range(4097, 6000), 128, 4096),
        ([384], 256, LONGEST_TILE_ROWS),
        ([128, 768], 512, LONGEST_TILE_ROWS),
        ([128, 768, 1536], 512, 1024),
        ([128, 768, 512], 1024, LONGEST_TILE_ROWS),
        ([128, 768, 512, 4096], 1024, 3072),
        ([1152], 128, 1024),
    ],
)
def test_products_run_in_all_numbers_of_rows_that_have_the_same_bits(
    moods: Container[int], multiple: int, tile_rows: int
) -> None:
    rule, like, weight = RowRule(multiple=1024, tile_rows=1024), torch.empty(0), drawn(4, 8)
    steady, moody = (Moody(weight, None, 1024, moods=each) for each in ((), moods))
    found = widened(rule, [(steady, like), (moody, like)])
    assert (found.multiple, found.tile_rows) == (multiple, tile_rows)
