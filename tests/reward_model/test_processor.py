"""The line that tells kinds of processors apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from serve_app.reward_model import processor
from serve_app.reward_model.processor import processor_of

CPU = torch.device("cpu")
AMD = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9B14
flags\t\t: fpu

processor\t: 1
model name\t: another
"""


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    processor_of.cache_clear()
    yield
    processor_of.cache_clear()


def line_of(monkeypatch: pytest.MonkeyPatch, path: Path) -> str:
    processor_of.cache_clear()
    monkeypatch.setattr(processor, "CPU_FACTS", path)
    return processor_of(CPU)


def test_cpus_are_told_apart_by_what_cuts_their_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(AMD)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    first = line_of(monkeypatch, path)
    assert first.startswith("AMD EPYC 9B14 (AuthenticAMD/25/17, AVX2")
    assert first.endswith(f"torch {torch.__version__}, sums {processor.SUMS}")
    path.write_text(AMD.replace(": 17", ": 97"))
    lines = [first, line_of(monkeypatch, path)]
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    lines.append(line_of(monkeypatch, path))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    lines.append(line_of(monkeypatch, path))
    monkeypatch.setattr(processor, "SUMS", processor.SUMS + 1)
    lines.append(line_of(monkeypatch, path))
    assert len(set(lines)) == len(lines)
    assert line_of(monkeypatch, tmp_path / "nowhere")  # as on machines without Linux


def test_cards_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same chip with fewer multiprocessors, as a slice of it has, cuts work otherwise."""
    facts = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: facts)
    assert processor_of(torch.device("cuda")).startswith("NVIDIA H100 (9.0, 132 multiprocessors), torch ")
