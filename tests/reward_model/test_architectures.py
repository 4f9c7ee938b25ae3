"""Llama, Mistral, Qwen2 and Qwen3 with a scalar head score as Transformers' own classes do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from serve_app.reward_model import RewardModel, UnsupportedArchitectureError, WeightError
from serve_app.reward_model.architecture import DecoderConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_labels": 1,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def llama(**options: Any) -> PreTrainedModel:
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE | options))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-3-rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "llama-linear-rope": lambda: llama(rope_parameters=LINEAR_ROPE),
    "llama-all-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-multi-query": lambda: llama(num_key_value_heads=1),
    "mistral": lambda: MistralForSequenceClassification(MistralConfig(**SHAPE, head_dim=24, sliding_window=None)),
    "qwen2": lambda: Qwen2ForSequenceClassification(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForSequenceClassification(Qwen3Config(**SHAPE, head_dim=32)),
}


@pytest.fixture
def sequences() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(1, 300, length).tolist() for length in (1, 2, 17, 64, 65, 200, 400)]


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save with every weight drawn anew: fresh norms and biases are ones and zeros, and would hide a mix-up."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        drawn = torch.randn(parameter.shape, generator=generator) * spread
        parameter.data = drawn + (1.0 if parameter.ndim == 1 else 0.0)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_scores_equal_transformers(name: str, tmp_path: Path, sequences: list[list[int]]) -> None:
    reference = MODELS[name]().eval()
    save(reference, tmp_path)
    with torch.inference_mode():
        expected = [reference(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]
    model = RewardModel.from_pretrained(str(tmp_path), device="cpu", dtype="float32")
    np.testing.assert_allclose(model.score_token_ids(sequences), expected, rtol=1e-4, atol=1e-4)


def test_dynamic_rope_beyond_the_maximum_equals_transformers(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ids = np.random.default_rng(1).integers(1, 300, 900).tolist()
    reference = llama(rope_parameters=rope).eval()
    save(reference, tmp_path)
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([ids])).logits.item()
    model = RewardModel.from_pretrained(str(tmp_path), device="cpu", dtype="float32")
    assert model.score_token_ids([ids[:600], ids, ids[:30]])[1] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def config_with(**changes: Any) -> dict[str, Any]:
    return LlamaConfig(**SHAPE).to_dict() | {"architectures": ["LlamaForSequenceClassification"]} | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["GPT2ForSequenceClassification"]}, "GPT2.*InternLM2ForRewardModel.*Qwen3"),
        ({"architectures": None}, "None is not supported"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": None}, "has 2 labels"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "RoPE scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        DecoderConfig.from_dict(config_with(**changes))


def test_a_sliding_window_bounds_the_length_it_is_exact_for() -> None:
    mistral = config_with(architectures=["MistralForSequenceClassification"], model_type="mistral", sliding_window=128)
    qwen = config_with(architectures=["Qwen2ForSequenceClassification"], sliding_window=128, use_sliding_window=False)
    assert DecoderConfig.from_dict(mistral).max_tokens == 128
    assert DecoderConfig.from_dict(qwen).max_tokens == 512


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(WeightError, match=r"mlp\.\w+_proj\.weight has shape \[.*160.*\]; the configuration asks for"):
        RewardModel.from_pretrained(str(tmp_path), device="cpu")
