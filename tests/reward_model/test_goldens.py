"""Scores against the original implementation's, on real conversations and on every shape of its architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_app.reward_model import RewardModel
from tests.goldens import WEIGHTS, make_golden


def test_float32_scores_equal_the_originals(golden_fp32: RewardModel, goldens: list[dict[str, Any]]) -> None:
    scores = golden_fp32.get_scores([golden["messages"] for golden in goldens])
    np.testing.assert_allclose(scores, [golden["score"] for golden in goldens], atol=1e-3, rtol=0)


def test_bfloat16_scores_are_near(golden_bf16: RewardModel, goldens: list[dict[str, Any]]) -> None:
    """The weights alone, rounded to bfloat16, move a score by up to 0.07."""
    scores = golden_bf16.get_scores([golden["messages"] for golden in goldens])
    errors = np.abs(np.array(scores) - [golden["score"] for golden in goldens])
    assert errors.max() < 0.15
    assert errors.mean() < 0.04


@pytest.mark.parametrize("variant", sorted(WEIGHTS))
def test_every_variant_of_the_architecture_scores_as_the_original(tmp_path: Path, variant: str) -> None:
    folder = make_golden(variant, tmp_path / variant)
    cases = json.loads((folder / "scores.json").read_text())
    model = RewardModel.from_pretrained(str(folder), device="cpu", dtype="float32")
    scores = model.score_token_ids([case["input_ids"] for case in cases])
    np.testing.assert_allclose(scores, [case["score"] for case in cases], atol=1e-3, rtol=1e-4)


def test_the_real_models_configuration_is_read(shared: Path) -> None:
    from serve_app.reward_model.architecture import DecoderConfig

    config = DecoderConfig.from_folder(shared / "models" / "internlm2-1_8b-reward-files")
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (2048, 24, 16, 8)
    assert (config.head_dim, config.intermediate_size, config.reward_token_id) == (128, 8192, 92527)
    assert (config.rope.theta, config.max_tokens, config.dtype) == (1e6, 32768, "float16")
