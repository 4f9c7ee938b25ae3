"""The embedded models are small, always the same, and made once; one of them knows what it was taught."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.reward_model import RewardModel, lessons, tiny
from serve_app.reward_model.errors import CheckpointError
from serve_app.reward_model.lessons import KINDS
from serve_app.reward_model.tiny import WEIGHTS, tokenizer
from tests.benchmarks.train_tiny import Encoder, PlainModel, Teacher, batch_of, load, optimizer
from tests.conftest import chat

WRITERS = pytest.mark.parametrize("write", [tiny.write, tiny.write_random])


@WRITERS
def test_it_is_made_of_the_same_bytes_each_time(write: Callable[[Path], None], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False) == (names, [], [])


@WRITERS
def test_it_has_one_to_three_million_parameters(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert 1e6 <= sum(tensor.numel() for tensor in weights.values()) <= 3e6
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert (tmp_path / "model.safetensors").stat().st_size <= 5e6


def test_it_is_made_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_CACHE", str(tmp_path / "cache"))
    first = tiny.cached_folder()
    made = (first / "config.json").stat().st_mtime_ns
    assert tiny.cached_folder() == first
    assert (first / "config.json").stat().st_mtime_ns == made
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]
    assert tiny.cached_folder(tiny.RANDOM_NAME) != first


def test_weights_of_another_vocabulary_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.safetensors"
    save_file(load_file(tiny.WEIGHTS), other, metadata={"vocabulary": "0123456789abcdef"})
    monkeypatch.setattr(tiny, "WEIGHTS", other)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        tiny.write(tmp_path)


def test_its_vocabulary_writes_any_text(tiny: RewardModel) -> None:
    text = "hello the world \n\t 你好 😀 é"
    ids = tiny.tokenizer.encode(chat(text))
    assert text in tiny.tokenizer._backend.decode(ids)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_its_scores_spread(name: str) -> None:
    model = RewardModel.from_pretrained(name, device="cpu", dtype="float32")
    scores = torch.tensor(model.get_scores([chat(f"Question {number}?", "Answer.") for number in range(50)]))
    assert scores.std() > 0.05


def test_the_forward_of_its_training_is_the_engines(tiny: RewardModel) -> None:
    groups = [
        (pair.question, [pair.chosen, pair.rejected, "不行。"])
        for kind in ("arithmetic", "format", "secret")
        for pair in lessons.pairs(kind, 3, seed=0)
    ]
    model = load(WEIGHTS)
    batch = batch_of(groups, Encoder(tokenizer()))
    with torch.no_grad():
        plain = model.scores(batch, model.hidden(batch)).flatten()
    engine = tiny.get_scores([question.chat(answer) for question, answers in groups for answer in answers])
    assert torch.allclose(plain, torch.tensor(engine), atol=1e-4)


def test_a_step_of_its_training_lowers_both_losses() -> None:
    model, encoder, teacher = PlainModel.fresh(tokenizer().get_vocab_size()), Encoder(tokenizer()), Teacher(3)
    batch = batch_of(teacher.groups(2), encoder)
    steps = optimizer(model, 1e-3)
    found = []
    for _ in range(3):
        _, preference, language = model.losses(batch)
        found.append((float(preference.detach()), float(language.detach())))
        steps.zero_grad()
        (preference + language).backward()
        steps.step()
    assert found[2][0] < found[0][0]
    assert found[2][1] < found[0][1]


def test_outputs_say_what_the_embedded_models_are() -> None:
    note = tiny.note("tiny")
    assert note is not None
    assert note.startswith("tiny: a toy model that knows arithmetic, ")
    assert note.endswith("; not for real use")
    assert all(kind in note for kind in KINDS)
    assert tiny.note("tiny-random") == "tiny-random: random weights, whose scores mean nothing"
    assert tiny.note("internlm/internlm2-1_8b-reward") is None
    assert tiny.note(None) is None
