"""Gemma and Gemma 2 score as Transformers' own classes, windows and capped logits included, and keep their bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForSequenceClassification,
    GemmaConfig,
    GemmaForSequenceClassification,
    PreTrainedModel,
)

from serve_app.reward_model import RewardModel, UnsupportedArchitectureError
from serve_app.reward_model.architecture import DecoderConfig
from tests.reward_model.test_architectures import SHAPE, save

GEMMA = SHAPE | {"head_dim": 32, "hidden_size": 64}
WINDOW = 40
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
GEMMA2 = GEMMA | {"num_hidden_layers": 4, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}
MODELS: dict[str, Any] = {
    "gemma": lambda: GemmaForSequenceClassification(GemmaConfig(**GEMMA, **EAGER)),
    "gemma2": lambda: gemma2(),
    # Low caps bend the logits of random weights too; an odd number of layers ends in one that sees a window.
    "gemma2-strong-cap": lambda: gemma2(attn_logit_softcapping=0.5, num_hidden_layers=3),
    "gemma2-no-cap": lambda: gemma2(attn_logit_softcapping=None, num_hidden_layers=3),
}


def gemma2(**options: Any) -> PreTrainedModel:
    return Gemma2ForSequenceClassification(Gemma2Config(**GEMMA2 | options | EAGER))


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    generator = np.random.default_rng(0)
    prompt = generator.integers(1, 300, 70).tolist()
    lone = [generator.integers(1, 300, length).tolist() for length in (1, 2, 31, WINDOW, WINDOW + 1, 64, 65, 300)]
    answers = [prompt + generator.integers(1, 300, length).tolist() for length in (1, 20, 100)]
    deeper = [answers[2][:end] + generator.integers(1, 300, length).tolist() for end, length in ((90, 0), (120, 30))]
    return [*lone, *answers, *deeper, prompt[:40]]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_scores_equal_transformers(name: str, tmp_path: Path, sequences: list[list[int]]) -> None:
    """Beyond the window's length, alone, as prefixes and as branches at several depths."""
    reference = MODELS[name]().eval()
    save(reference, tmp_path)
    with torch.inference_mode():
        expected = [reference(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]
    model = RewardModel.from_pretrained(str(tmp_path), device="cpu", dtype="float32")
    scores = model.score_token_ids(sequences)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    model.scorer.share_prompts = False
    assert np.array_equal(model.score_token_ids(sequences), scores)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["gemma2", "gemma2-strong-cap"])
@pytest.mark.usefixtures("threads")
def test_bits_are_those_of_the_sequence_alone(
    name: str, tmp_path: Path, sequences: list[list[int]], num_threads: int
) -> None:
    save(MODELS[name](), tmp_path)
    model = RewardModel.from_pretrained(str(tmp_path), device="cpu", dtype="float32")
    torch.set_num_threads(1)
    alone = np.concatenate([model.score_token_ids([ids]) for ids in sequences])
    torch.set_num_threads(num_threads)
    for budget in (100, 5000):
        model.scorer.token_budget = budget
        assert np.array_equal(model.score_token_ids(sequences[::-1])[::-1], alone)


def test_windows_alternate_and_positions_are_those_of_the_model() -> None:
    config = DecoderConfig.from_dict(
        Gemma2Config(**GEMMA2).to_dict() | {"architectures": ["Gemma2ForSequenceClassification"]}
    )
    assert config.windows == (WINDOW, None, WINDOW, None)
    assert config.max_tokens == 512
    assert config.attention_scale == pytest.approx(24**-0.5)


def test_the_embeddings_scale_is_rounded_as_transformers_does(tmp_path: Path) -> None:
    """By the model's dtype: the square root of 72 is 8.485, and 8.5 in bfloat16."""
    save(gemma2(hidden_size=72, num_attention_heads=6, num_key_value_heads=6), tmp_path)
    scales = [
        RewardModel.from_pretrained(str(tmp_path), device="cpu", dtype=dtype).scorer.decoder._embedding_scale
        for dtype in ("float32", "bfloat16")
    ]
    assert scales == [pytest.approx(72**0.5), 8.5]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_activation": "relu"}, "hidden_act 'relu'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    config = Gemma2Config(**GEMMA2).to_dict() | {"architectures": ["Gemma2ForSequenceClassification"]}
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        DecoderConfig.from_dict(config | changes)
