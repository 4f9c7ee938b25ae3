"""jobs.verify passes a model that gives the published figures or Transformers' scores, and no other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import verify
from jobs.benchmarks import published, side_by_side
from jobs.benchmarks.published import (
    INTERNLM2_1_8B,
    POLAR_7B,
    PUBLISHED,
    SKYWORK_V2_LLAMA_8B,
    SKYWORK_V2_QWEN3_0_6B,
    Published,
    Shape,
    published_for,
)
from jobs.benchmarks.side_by_side import CHATS, Reading
from serve_app.reward_model import RewardModel
from serve_app.reward_model.architecture import DecoderConfig
from tests.reward_model import polar
from tests.reward_model.classifiers import change_json, tokenizer_adds, write


class CardModel:
    """Gives one card's scores, moved by `shift`."""

    def __init__(self, shift: float, *, device: str, dtype: torch.dtype, figures: Published = INTERNLM2_1_8B) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self._scores = {chat: score + shift for chat, score in zip(figures.conversations, figures.scores, strict=True)}

    def get_scores(self, conversations: list[Any]) -> list[float]:
        return [self._scores[conversation] for conversation in conversations]

    compare = RewardModel.compare
    rank = RewardModel.rank


@pytest.mark.parametrize(
    ("figures", "device", "dtype", "shift", "agrees"),
    [
        (INTERNLM2_1_8B, "cuda", torch.float16, 0.019, True),
        (INTERNLM2_1_8B, "cuda", torch.float16, 0.021, False),
        (INTERNLM2_1_8B, "cuda", torch.bfloat16, 0.14, True),
        (INTERNLM2_1_8B, "cpu", torch.float16, 0.14, True),
        (INTERNLM2_1_8B, "cpu", torch.float32, 0.16, False),
        (POLAR_7B, "cuda", torch.float32, 0.019, True),
        (POLAR_7B, "cuda", torch.float32, 0.021, False),
        (SKYWORK_V2_QWEN3_0_6B, "cuda", torch.bfloat16, 0.19, True),
        (SKYWORK_V2_QWEN3_0_6B, "cuda", torch.bfloat16, 0.21, False),
        (SKYWORK_V2_QWEN3_0_6B, "cpu", torch.float32, 0.39, True),
    ],
)
def test_scores_agree_within_the_dtypes_tolerance(
    figures: Published, device: str, dtype: torch.dtype, shift: float, agrees: bool
) -> None:
    results = verify.checks(CardModel(shift, device=device, dtype=dtype, figures=figures), figures)  # type: ignore[arg-type]
    assert [check.name for check in results] == ["score_1", "score_2", "compare", "rank"]
    assert all(check.agrees for check in results[:2]) is agrees
    assert all(check.agrees for check in results[2:])


def test_published_figures_are_those_of_their_sources() -> None:
    assert {figures.model: figures.scores for figures in PUBLISHED} == {
        "internlm/internlm2-1_8b-reward": (0.767578125, -2.22265625),
        "internlm/POLAR-7B": (-0.5702977776527405, -11.030370712280273),
        "Skywork/Skywork-Reward-V2-Qwen3-0.6B": (7.875, 0.9453125),
        "Skywork/Skywork-Reward-V2-Llama-3.1-8B": (23.0, 3.59375),
        "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": (13.6875, -9.1875),
        "Skywork/Skywork-Reward-Llama-3.1-8B": (12.625, -15.25),
    }
    assert {conversation.reference for conversation in POLAR_7B.conversations} == {"Beijing."}
    wrong = SKYWORK_V2_LLAMA_8B.conversations[1].response.content
    assert wrong.count("\n") == 2
    assert wrong.endswith("9 ÷ 2 = 4.5 apples each. Each person gets 4 apples.")


def test_a_checkpoint_is_told_by_its_configuration(shared: Path) -> None:
    config = DecoderConfig.from_folder(shared / "models" / "internlm2-1_8b-reward-files")
    shape = Shape.of(config, takes_reference=False)
    assert published_for(shape) == (INTERNLM2_1_8B,)
    assert published_for(dataclasses.replace(shape, takes_reference=True)) == ()
    assert published_for(dataclasses.replace(shape, hidden_size=4096, num_layers=32)) == ()  # InternLM2-7B-Reward's
    assert published_for(dataclasses.replace(POLAR_7B.shape)) == (POLAR_7B,)
    assert len(published_for(SKYWORK_V2_LLAMA_8B.shape)) == 3


@pytest.mark.parametrize("family", ["InternLM2", "POLAR", "Llama"])
def test_a_model_without_figures_is_refused_before_its_weights_are_read(
    tmp_path: Path, family: str, tiny: RewardModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {
        "InternLM2": lambda: tiny.folder,
        "POLAR": lambda: polar.write(tmp_path),
        "Llama": lambda: write(tmp_path),
    }
    monkeypatch.setattr(verify, "_load", lambda config: pytest.fail("the weights were read"))
    assert verify.main(["--model", str(folder[family]())]) == 1
    said = capsys.readouterr().err
    assert "no figures are published for a model such as" in said
    assert "Skywork/Skywork-Reward-V2-Qwen3-0.6B" in said
    assert "--against transformers compares any model" in said


def test_a_model_of_a_published_shape_with_other_scores_is_a_mismatch(
    tiny: RewardModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one whose scores are those of one of several candidates is that one."""
    shape = Shape.of(tiny.config, takes_reference=False)
    other = dataclasses.replace(INTERNLM2_1_8B, shape=shape)
    monkeypatch.setattr(published, "PUBLISHED", (other,))
    arguments = ["--model", str(tiny.folder), "--dtype", "float32"]
    assert verify.main(arguments) == 4
    printed = capsys.readouterr().out
    assert "0.767578" in printed
    assert "MISMATCH" in printed
    assert "not internlm/internlm2-1_8b-reward, or a fault" in printed
    own = dataclasses.replace(
        other, model="the/tiny", scores=tuple(tiny.get_scores(other.conversations)), tolerance_other=1e-6
    )
    monkeypatch.setattr(published, "PUBLISHED", (other, own))
    assert own.scores[0] > own.scores[1]
    assert verify.main(arguments) == 0
    assert "these are the figures of the/tiny\n" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--model", "./nowhere"]) == 1
    assert "jobs.verify stopped: model folder ./nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Llama", {"bos": "<s>"}),
        ("Qwen2", {"pad": "<|im_end|>"}),
        ("Llama", {"pad": "<|im_end|>"}),
        ("Qwen3", {"pad": None}),
    ],
)
def test_a_checkpoint_scores_as_transformers_own_class(
    tmp_path: Path, family: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the padding token ending every turn, too: the score is read one token earlier then."""
    folder = write(tmp_path, family=family, **options)
    if "bos" in options:
        tokenizer_adds(folder, front="<s>")
    assert verify.main(["--model", str(folder), "--against", "transformers", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert f"beside {family}ForSequenceClassification of Transformers" in printed
    lines = [line for line in printed.splitlines() if line.endswith("  ok")]
    assert len(lines) == len(CHATS) >= 5
    for line in lines:
        ids, place = (int(cell) for cell in line.split()[-5:-3])
        assert place == ids - (2 if options.get("pad") == "<|im_end|>" else 1)


def test_other_ids_another_place_and_another_score_are_mismatches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, family="Qwen2", pad="<|im_end|>")
    arguments = ["--model", str(folder), "--against", "transformers", "--dtype", "float32"]
    with monkeypatch.context() as patch:  # the place where rayward read before it knew of padding
        patch.setattr(DecoderConfig, "num_read", lambda self, ids: len(ids))
        assert verify.main(arguments) == 4
    printed = capsys.readouterr().out
    assert printed.count("MISMATCH") == len(CHATS)
    assert " / " in printed
    weights = load_file(folder / "model.safetensors")

    def moved(config: verify.VerifyConfig) -> RewardModel:
        save_file(weights | {"score.weight": 1.01 * weights["score.weight"]}, folder / "model.safetensors")
        model = RewardModel.from_pretrained(folder, device="cpu", dtype="float32")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return model

    monkeypatch.setattr(verify, "_load", moved)
    assert verify.main(arguments) == 4
    assert "MISMATCH" in capsys.readouterr().out


def test_readings_agree_only_in_ids_place_and_score() -> None:
    one = Reading((1, 2, 3), 2, 1.0)
    assert one.agrees(dataclasses.replace(one, score=1.001), dtype="float32")
    assert not one.agrees(dataclasses.replace(one, score=1.01), dtype="float32")
    assert one.agrees(dataclasses.replace(one, score=1.1), dtype="bfloat16")
    assert not one.agrees(dataclasses.replace(one, place=1), dtype="float32")
    assert not one.agrees(dataclasses.replace(one, token_ids=(1, 2, 4)), dtype="float32")


def test_what_transformers_does_not_ship_is_refused_by_name(
    tiny: RewardModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main(["--model", str(tiny.folder), "--against", "transformers"]) == 1
    assert "ships no class that scores InternLM2ForRewardModel" in capsys.readouterr().err


def test_too_little_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cpu = write(tmp_path), torch.device("cpu")
    assert side_by_side.room_warning(folder, cpu) is None
    monkeypatch.setattr(side_by_side, "_free_bytes", lambda device: 1000)
    warning = side_by_side.room_warning(folder, cpu)
    assert warning is not None
    assert "may not fit" in warning


def test_a_broken_checkpoint_is_one_error_on_either_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path)
    change_json(folder / "config.json", num_hidden_layers=3)
    assert verify.main(["--model", str(folder), "--against", "transformers"]) == 1
    assert "jobs.verify stopped: missing weights in" in capsys.readouterr().err
