"""Heads of every name and depth score as the layers that they are; what is no single head of one row is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.reward_model import UnsupportedArchitectureError, WeightError
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.families import REFUSED
from tests.reward_model.tiny_checkpoints import (
    HIDDEN,
    SEQUENCES,
    assert_scores,
    body,
    drawn,
    last_states,
    load,
    write,
)

WIDTH = 40  # of a hidden layer: no multiple of 16

LINEAR = {"weight": drawn(1, HIDDEN, seed=5)}
BIASED = LINEAR | {"bias": torch.tensor([0.7])}
MLP = {"0.weight": drawn(WIDTH, HIDDEN, seed=6), "2.weight": drawn(1, WIDTH, seed=7)}
BIASED_MLP = MLP | {"0.bias": drawn(WIDTH, seed=8), "2.bias": torch.tensor([-0.4])}


def reference(head: dict[str, Tensor], states: Tensor) -> Tensor:
    """The head's layers one after another, ReLU between."""
    layers = sorted({name.rpartition(".")[0] for name in head})
    for place, layer in enumerate(layers):
        dot = "." if layer else ""
        states = F.linear(states, head[f"{layer}{dot}weight"], head.get(f"{layer}{dot}bias"))
        states = F.relu(states) if place < len(layers) - 1 else states
    return states[:, 0]


@pytest.mark.parametrize(
    ("architecture", "model_type", "name", "head"),
    [
        ("LlamaForSequenceClassification", "llama", "score", LINEAR),
        ("LlamaForSequenceClassification", "llama", "score", BIASED),
        ("Qwen2ForTokenClassification", "qwen2", "score", BIASED),
        ("Qwen2ForRewardModel", "qwen2", "score", MLP),
        ("Qwen2ForRewardModel", "qwen2", "score", BIASED_MLP),
        ("Qwen3ForRewardModel", "qwen3", "score", BIASED_MLP),
        ("INFORMForSequenceClassification", "llama", "score", BIASED_MLP),
        ("LlamaRewardModel", "llama", "regression_head", LINEAR),
        ("EurusRewardModel", "mistral", "regression_head", LINEAR),
        ("Qwen2ForCausalRM", "qwen2", "v_head.summary", BIASED),
        ("GRewardModel", "llama", "v_head.summary", BIASED_MLP),
        ("GPTRewardModel", "llama", "v_head", LINEAR),
        ("LlamaForScore", "llama", "score_head", BIASED),
        ("RewardModel", "qwen2", "score", LINEAR),
        ("RewardModel", "mistral", "value_head", LINEAR),
    ],
)
def test_a_head_of_any_name_and_depth(
    tmp_path: Path, architecture: str, model_type: str, name: str, head: dict[str, Tensor]
) -> None:
    weights = body(model_type)
    named = {f"{name}.{part}": tensor for part, tensor in head.items()}
    fields: dict[str, Any] = {} if architecture == "RewardModel" else {"num_labels": 1}
    folder = write(tmp_path, weights | named, architecture, model_type, **fields)
    assert_scores(load(folder), reference(head, last_states(weights, model_type)))


def test_a_bias_of_the_head_in_bfloat16_too(tmp_path: Path) -> None:
    weights = body()
    folder = write(tmp_path, weights | {f"score.{part}": tensor for part, tensor in BIASED_MLP.items()}, "RewardModel")
    model = load(folder)
    scores = model.score_token_ids(SEQUENCES)
    rounded = type(model).from_pretrained(str(folder), device="cpu", dtype="bfloat16").score_token_ids(SEQUENCES)
    np.testing.assert_allclose(rounded, scores, atol=0.1)
    assert not np.array_equal(rounded, scores)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.usefixtures("threads")
def test_a_deep_head_keeps_its_bits_among_many(tmp_path: Path, num_threads: int) -> None:
    weights = body() | {f"score.{part}": tensor for part, tensor in BIASED_MLP.items()}
    model = load(write(tmp_path, weights, "INFORMForSequenceClassification"))
    torch.set_num_threads(1)
    alone = np.concatenate([model.score_token_ids([ids]) for ids in SEQUENCES])
    torch.set_num_threads(num_threads)
    assert np.array_equal(model.score_token_ids(SEQUENCES * 9), np.tile(alone, 9))


def test_what_wraps_a_model_is_taken_off_its_names(tmp_path: Path) -> None:
    """OpenRLHF#542: the base model's own names, without "model."; TRL's value-head models and Starling's add some."""
    weights, head = body(), {"v_head.weight": LINEAR["weight"]}
    expected = reference(LINEAR, last_states(weights))
    for place, wrapper in enumerate(("", "pretrained_model.model.", "transformer.", "model.model.", "module.model.")):
        wrapped = {wrapper + name.removeprefix("model."): tensor for name, tensor in weights.items()}
        assert_scores(load(write(tmp_path / str(place), wrapped | head, "RewardModel")), expected)


def test_layers_that_were_saved_twice_are_refused_but_for_the_class_that_does_so(tmp_path: Path) -> None:
    weights = body() | {"v_head.weight": LINEAR["weight"]}
    again = {name.replace("model.", "transformer."): tensor.clone() for name, tensor in body().items()}
    folder = write(tmp_path / "starling", weights | again | {"model.lm_head.weight": drawn(300, 64)}, "GPTRewardModel")
    assert_scores(load(folder), reference(LINEAR, last_states(body())))
    with pytest.raises(WeightError, match=r"is there twice, as model\.\S+ and transformer\.\S+ \("):
        load(write(tmp_path / "other", weights | again, "LlamaRewardModel"))


def test_a_language_models_head_left_over_is_no_surplus(tmp_path: Path) -> None:
    weights = body() | {"score.weight": LINEAR["weight"], "lm_head.weight": drawn(300, HIDDEN)}
    folder = write(tmp_path, weights, "LlamaForSequenceClassification", num_labels=1)
    assert_scores(load(folder), reference(LINEAR, last_states(body())))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ({}, r"no head in model\.safetensors: none of score\.weight, v_head\.weight.*lost"),
        (
            {"score.weight": drawn(1, HIDDEN), "v_head.weight": drawn(1, HIDDEN)},
            r"two heads: score\.weight \[1, 64\] in model\.safetensors, v_head\.weight \[1, 64\] in model\.safetensors",
        ),
        ({"score.weight": drawn(2, HIDDEN)}, r"score\.weight has shape \[2, 64\].* for \[1, 64\] \(model\.safetensors"),
        ({"score.weight": drawn(1, 32)}, r"score\.weight has shape \[1, 32\].* for \[1, 64\]"),
        ({"score.weight": drawn(1, HIDDEN), "score.bias": torch.ones(2)}, r"score\.bias has shape \[2\].* for \[1\]"),
        (
            {"score.0.weight": drawn(32, HIDDEN), "score.2.weight": drawn(1, 48)},
            r"score\.2\.weight has shape \[1, 48\].* for \[1, 32\]",
        ),
    ],
    ids=["none", "two", "two labels", "too narrow", "bias", "layers that do not meet"],
)
def test_what_is_no_single_head_of_one_row_is_refused(tmp_path: Path, head: dict[str, Tensor], reason: str) -> None:
    folder = write(tmp_path, body() | head, "LlamaForSequenceClassification", num_labels=1)
    with pytest.raises(WeightError, match=reason):
        load(folder)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_class_that_is_known_and_not_supported_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=re.escape(f"{name} is not supported: {REFUSED[name]}")):
        DecoderConfig.from_dict({"architectures": [name]})


def test_a_trainers_class_needs_a_known_model_type() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"RewardModel with model_type 'bloom'.*gemma2, internlm2"):
        DecoderConfig.from_dict({"architectures": ["RewardModel"], "model_type": "bloom"})


@pytest.mark.parametrize("labels", [{"num_labels": 3}, {"num_labels": None, "id2label": {"0": "bad", "1": "good"}}])
def test_several_labels_are_refused(tmp_path: Path, labels: dict[str, Any]) -> None:
    weights = body() | {"score.weight": drawn(3, HIDDEN)}
    with pytest.raises(UnsupportedArchitectureError, match=r"has \d labels; a reward model has num_labels == 1"):
        load(write(tmp_path, weights, "LlamaForTokenClassification", **labels))
