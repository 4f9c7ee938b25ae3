"""Scores are read where Transformers' classes read them: at the last token that is not the padding token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from serve_app.reward_model import RewardModel
from serve_app.reward_model.architecture import DecoderConfig
from tests.conftest import chat
from tests.reward_model.classifiers import CORPUS, change_json, reference, reference_scores, write
from tests.reward_model.test_sharing import rows_read

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
PAD = 2  # <|im_end|>, which is the end of a turn as well
PROMPT = [5, *range(20, 60)]
SEQUENCES = [
    [PAD],
    [PAD] * 5,
    [7],
    [7, PAD],
    [PAD, 7],
    [PAD, PAD, 7, PAD, PAD],
    [7, PAD, 9, PAD],
    [7, 8, 9],
    [*PROMPT, 7, 8],
    [*PROMPT, 7, PAD],
    [*PROMPT, PAD],
    [*PROMPT, PAD, PAD, PAD],
    [*PROMPT, PAD, 9, PAD],
    PROMPT,
    [*([9] * 80), *([PAD] * 70)],
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pad-is-end"), family=request.param, pad="<|im_end|>")


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(str(folder), device="cpu", dtype="float32")


def test_ids_that_hold_the_padding_token_score_as_in_transformers(folder: Path, model: RewardModel) -> None:
    """Alone and in one batch, several of them behind one prompt: the same bits, and Transformers' number."""
    together = model.score_token_ids(SEQUENCES)
    np.testing.assert_allclose(together, reference_scores(folder, SEQUENCES), rtol=1e-4, atol=1e-4)
    alone = np.concatenate([model.score_token_ids([ids]) for ids in SEQUENCES])
    np.testing.assert_array_equal(alone, together)


def test_a_padded_batch_of_transformers_scores_the_same(folder: Path, model: RewardModel) -> None:
    sequences = [ids for ids in SEQUENCES if ids[0] != PAD]  # else the mask would hide them from Transformers
    width = max(map(len, sequences))
    for side in ("left", "right"):
        padding = [[PAD] * (width - len(ids)) for ids in sequences]
        rows = [[*pad, *ids] if side == "left" else [*ids, *pad] for ids, pad in zip(sequences, padding, strict=True)]
        mask = [[0] * len(pad) + [1] * len(ids) for ids, pad in zip(sequences, padding, strict=True)]
        mask = mask if side == "left" else [row[::-1] for row in mask]
        positions = (torch.tensor(mask).cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            expected = reference(folder)(
                input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask), position_ids=positions
            )
        np.testing.assert_allclose(
            model.score_token_ids(sequences), expected.logits[:, 0].tolist(), rtol=1e-3, atol=1e-3
        )


def test_a_conversation_scores_as_its_model_card_computes_it(folder: Path, model: RewardModel) -> None:
    """Two answers whose order reverses where the last token is read."""
    chats = [chat("hello, how are you?", answer) for answer in ("the answer is four", "I do not know", CORPUS[0])]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids: Any = [tokenizer.apply_chat_template(each, return_dict=False) for each in chats]
    assert all(each[-1] == PAD for each in ids)
    assert model.get_scores(chats) == pytest.approx(reference_scores(folder, ids), rel=1e-4, abs=1e-4)


def test_padding_behind_the_place_is_counted_but_not_computed(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_read(model, monkeypatch)
    model.score_token_ids([[7, 8, 9, *([PAD] * 200)]])
    assert rows == [3]
    conversation = chat("hello", "four")
    (score,) = model.score([conversation])
    assert score.num_tokens == len(model.tokenizer.encode(conversation))


@pytest.mark.parametrize("pad", [None, "missing"])
def test_without_a_padding_token_the_last_token_is_read(tmp_path: Path, pad: str | None) -> None:
    write(tmp_path, pad=None)
    if pad is not None:
        config = transformers.LlamaConfig.from_pretrained(tmp_path).to_dict()
        del config["pad_token_id"]
        change_json(tmp_path / "config.json", **config)
    model = RewardModel.from_pretrained(str(tmp_path), device="cpu", dtype="float32")
    np.testing.assert_allclose(
        model.score_token_ids(SEQUENCES), reference_scores(tmp_path, SEQUENCES), rtol=1e-4, atol=1e-4
    )


def test_internlm2_is_read_at_its_reward_token_whatever_its_padding_token(tiny: RewardModel) -> None:
    assert tiny.config.pad_token_id is None
    pad = 2
    ids = tiny.tokenizer.encode(chat("hello", "four"))
    plain, padded = tiny.score_token_ids([ids, [*ids, pad]])
    assert plain != padded
    assert tiny.config.num_read([*ids, pad]) == len(ids) + 1


def test_the_configurations_padding_token_decides_and_not_the_tokenizers(tmp_path: Path) -> None:
    write(tmp_path, pad="<|im_end|>")
    change_json(tmp_path / "config.json", pad_token_id=3)
    assert DecoderConfig.from_folder(tmp_path).num_read([7, PAD, 3, 3]) == 2
