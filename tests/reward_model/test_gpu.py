"""The engine on CUDA: near the CPU's float32 scores, and one conversation, one score, to the bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.reward_model import RewardModel
from serve_app.reward_model.attention import BlockAttention, VarlenAttention, attention_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOLERANCES = {"float32": 2e-3, "float16": 0.05, "bfloat16": 0.15}


@pytest.fixture(scope="module", params=sorted(TOLERANCES))
def model(request: pytest.FixtureRequest, golden_folder: Any) -> RewardModel:
    return RewardModel.from_pretrained(str(golden_folder), device="cuda", dtype=request.param)


def test_scores_are_near_the_originals(model: RewardModel, goldens: list[dict[str, Any]]) -> None:
    scores = model.get_scores([golden["messages"] for golden in goldens])
    tolerance = TOLERANCES[str(model.dtype).removeprefix("torch.")]
    np.testing.assert_allclose(scores, [golden["score"] for golden in goldens], atol=tolerance, rtol=0)


@pytest.mark.parametrize("budget", [300, 2000, 20_000])
def test_bits_are_those_of_the_sequence_alone(
    model: RewardModel, goldens: list[dict[str, Any]], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [golden["input_ids"] for golden in goldens]
    alone = np.concatenate([model.score_token_ids([ids]) for ids in sequences])
    monkeypatch.setattr(model.scorer, "token_budget", budget)
    places = list(range(len(sequences)))
    random.Random(budget).shuffle(places)
    scores = model.score_token_ids([sequences[place] for place in places])
    assert np.array_equal(scores, alone[places])


def test_half_precision_takes_flash_attention() -> None:
    cuda = torch.device("cuda")
    assert isinstance(attention_for(cuda, torch.float16, 64), VarlenAttention)
    assert isinstance(attention_for(cuda, torch.bfloat16, 64), VarlenAttention)
    assert isinstance(attention_for(cuda, torch.float32, 64), BlockAttention)
