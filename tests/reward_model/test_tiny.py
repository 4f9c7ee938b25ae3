"""The embedded model is small, always the same, and made once."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
import torch

from serve_app.reward_model import RewardModel, tiny
from tests.conftest import chat


def test_it_is_made_of_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tiny.write(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False) == (names, [], [])


def test_it_has_one_to_three_million_parameters(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    from safetensors.torch import load_file

    num_parameters = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert 1e6 <= num_parameters <= 3e6


def test_it_is_made_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_CACHE", str(tmp_path / "cache"))
    first = tiny.cached_folder()
    made = (first / "config.json").stat().st_mtime_ns
    assert tiny.cached_folder() == first
    assert (first / "config.json").stat().st_mtime_ns == made
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]


def test_its_vocabulary_writes_any_text(tiny: RewardModel) -> None:
    text = "hello the world \n\t 你好 😀 é"
    ids = tiny.tokenizer.encode(chat(text))
    assert text in tiny.tokenizer._backend.decode(ids)


def test_its_scores_spread(tiny: RewardModel) -> None:
    scores = torch.tensor(tiny.get_scores([chat(f"Question {number}?", "Answer.") for number in range(50)]))
    assert scores.std() > 0.05
