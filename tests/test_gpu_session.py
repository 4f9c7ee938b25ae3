"""The session for a card, as far as a CPU can run it: its parts on small shapes, its limits, its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from serve_app.reward_model.linear import DenseLinear
from tests.benchmarks import gpu_bits, gpu_session
from tests.benchmarks.bench_engine import SHAPES
from tests.benchmarks.gpu_session import ENGINE, STEPS, Outcome, Step
from tests.reward_model.emulated_cuda import emulate_cuda

CPU = torch.device("cpu")


class PlaceLinear(DenseLinear):
    """A product whose bits depend on a row's place in its tile."""

    def __call__(self, x_TI: torch.Tensor, out_TO: torch.Tensor | None = None) -> torch.Tensor:
        out_TO = super().__call__(x_TI, out_TO)
        out_TO[:: self.tile_rows] *= 1 + 2**-10
        return out_TO


def test_products_are_probed_at_other_places_and_beside_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", (64, 1, 4, 2, 96))
    rows = list(gpu_bits.products(["tiny"], 2048, CPU))
    assert [(row["dtype"], row["setting"]) for row in rows[:2]] == [
        ("float16", "as PyTorch has it"),
        ("float16", "whole sums"),
    ]
    assert all(set(row["tflops"]) == {512, 1024, 2048} for row in rows)
    placed = PlaceLinear(torch.randn(16, 16), None, 16)
    assert list(gpu_bits._moved(placed, torch.randn(64, 16))) == ["shifted by 1"]


def test_attention_is_compared_with_the_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_cuda(monkeypatch)
    monkeypatch.setattr(gpu_bits, "HEADS", ((4, 2, 32),))
    monkeypatch.setattr(gpu_bits, "LENGTHS", (1, 31, 129))
    rows = list(gpu_bits.attention(CPU))
    assert [row["dtype"] for row in rows] == ["float16", "bfloat16"]
    assert all(row["furthest_from_float32"] < 0.05 for row in rows)


def test_launches_and_passes_are_timed() -> None:
    (row,) = gpu_bits.launches(["tiny"], 256, CPU)
    assert row["rows"] == 256
    assert row["done_ms"] > 0


def test_a_step_keeps_its_last_json_and_its_limit(tmp_path: Path) -> None:
    (tmp_path / "says.py").write_text("print('words')\nprint('{\"launches\": []}')\n")
    (tmp_path / "fails.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "hangs.py").write_text("import threading\nprint('begun', flush=True)\nthreading.Event().wait()\n")
    said = gpu_session.run(Step("says", 60, ("says",)), root=tmp_path)
    assert (said.status, said.found, said.told) == (0, {"launches": []}, "done")
    assert gpu_session.run(Step("fails", 60, ("fails",)), root=tmp_path).told == "failed with status 3"
    tests = Outcome("gpu tests", 1, 9.0, None, "..F.\nFAILED tests/a.py::test_a\nFAILED tests/a.py::test_b\n")
    assert tests.told == "2 failed, the others passed"
    hung = gpu_session.run(Step("hangs", 3, ("hangs",)), root=tmp_path)
    assert hung.status is None
    assert hung.told.startswith("ran out of its ")


def test_the_table_tells_every_step(tmp_path: Path) -> None:
    probed = {"multiple": 128, "tile_rows": 8192, "seconds": 0.5}
    product = {"preset": "7b", "dtype": "float16", "setting": "s", "moved": [], "probed": probed}
    bits = {"products": [product | {"tflops": {"1024": 612.0}}]}
    bench = {"workloads": {"mixed": {"tokens_per_s": 91234.5, "ceiling_fraction": 0.71}}}
    outcomes = [
        Outcome("bits of products", 0, 40.0, bits, ""),
        Outcome("7b", 0, 50.0, bench, ""),
        Outcome("gpu tests", None, 150.0, None, "cut"),
    ]
    gpu_session.write(tmp_path, "NVIDIA H200 (a card)", outcomes)
    table = (tmp_path / "gpu-nvidia-h200-a-card.md").read_text()
    assert (
        "| bits of products | done | 40 | 7b float16, s: moved none, multiples of 128 up to 8192 alike, 612.0 TFLOP/s |"
        in table
    )
    assert "| 7b | done | 50 | mixed: 91,234 tokens/s, 0.71 of the products' rate |" in table
    assert "| gpu tests | ran out of its 150 s | 150 | - |" in table
    assert json.loads((tmp_path / "gpu-nvidia-h200-a-card.json").read_text())["steps"][2]["status"] is None


def test_the_readmes_row_is_made_of_the_results(tmp_path: Path) -> None:
    """Also of none: the page says that nothing has run until a session's results are in their folder."""
    assert gpu_session.status_row() in Path(__file__).parents[1].joinpath("README.md").read_text().splitlines()
    assert gpu_session.status_row(tmp_path) == gpu_session.NOT_RUN
    outcomes = [Outcome(step.name, 0, 40.0, None, "") for step in STEPS[1:]]
    outcomes[0] = Outcome(STEPS[1].name, None, 30.0, None, "")
    gpu_session.write(tmp_path, "NVIDIA H200", outcomes)
    _, _, has_run, has_not, _ = gpu_session.status_row(tmp_path).split("|")
    assert has_run.strip() == f"NVIDIA H200 (PyTorch {torch.__version__}): {', '.join(step.name for step in STEPS[2:])}"
    doors = "several cards for one model, jobs, the endpoint, reward actors"
    told = f"{STEPS[0].name} (not begun), {STEPS[1].name} (ran out of its 30 s)"
    assert has_not.strip() == f"NVIDIA H200: {told}; {doors}"


def test_the_limits_leave_a_minute_of_ten() -> None:
    assert sum(step.limit_s for step in STEPS) <= 540
    assert all(step.arguments[0] == ENGINE for step in STEPS if step.name[0].isdigit())


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_session"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_session.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
